"""Summarize how much was skipped, in which layers, and how the routes differ between prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from firstlab.evaluation.predictions import Prediction
from firstlab.store import results


def skip_statistics(
    predictions: Sequence[Prediction], tokens: Sequence[int], num_layers: int, static: Tensor | None = None
) -> dict[str, Any]:
    """Skip rate (skipped ÷ L, mean over prompts), per layer and by group of prompts, and how adaptive the routes are.

    Args:
        tokens: Of each prompt, the length of its reference, for the rate by token.
        static: [L], a static set to compare the routes with.
    """
    all_rates = np.array([np.mean(p.skip_shares(num_layers)) for p in predictions])
    by_token = results.rate_by_token(all_rates, np.array(tokens))
    # Without a decode step, a method that decides at each of them decides nothing.
    predictions = [p for p in predictions if p.shares is None or p.new_tokens > 1] or predictions
    skipped = np.array([p.skip_shares(num_layers) for p in predictions])
    rates = skipped.mean(1)
    margin = 1.96 * float(rates.std(ddof=1)) / math.sqrt(len(rates)) if len(rates) > 1 else 0.0
    return {
        "skip_rate": float(rates.mean()),
        "skip_rate_by_token": by_token,
        "skip_rate_interval": [max(0.0, float(rates.mean()) - margin), min(1.0, float(rates.mean()) + margin)],
        "per_layer": skipped.mean(0).tolist(),
        "by_difficulty": _by_group(skipped, [p.difficulty for p in predictions]),
        "by_part": _by_group(skipped, [p.part for p in predictions]) if predictions[0].part else {},
        **_adaptivity(predictions, skipped, static),
    }


def _by_group(skipped: np.ndarray, groups: Sequence[int | str]) -> dict[str, dict[str, Any]]:
    rows = {str(group): skipped[[each == group for each in groups]] for group in sorted(set(groups))}
    return {
        group: {
            "n": len(each),
            "skip_rate": float(each.mean()),
            "per_layer": each.mean(0).tolist(),
            "unique_routes": len(np.unique(each, axis=0)),
        }
        for group, each in rows.items()
    }


def _adaptivity(predictions: Sequence[Prediction], skipped: np.ndarray, static: Tensor | None) -> dict[str, Any]:
    """How the routes differ between prompts; nulls where each decode step decides.

    The number of different routes, the entropy of their distribution, and the agreement (share of layers decided alike,
    mean over prompts) with the most frequent route and with the static set.
    """
    names = ("unique_routes", "route_entropy_bits", "mode_agreement", "static_agreement")
    if predictions[0].shares is not None:
        return dict.fromkeys(names)
    routes = Counter(tuple(p.skipped) for p in predictions)
    [(mode, _)] = routes.most_common(1)
    shares = np.array(list(routes.values())) / len(predictions)
    same_as_mode = skipped == np.isin(np.arange(skipped.shape[1]), mode)
    same_as_static = None if static is None else float((skipped == ~static.numpy()).mean())
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    return dict(zip(names, (len(routes), entropy, float(same_as_mode.mean()), same_as_static), strict=True))
