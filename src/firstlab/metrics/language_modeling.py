"""Perplexity of held-out text."""

from __future__ import annotations

import math


def perplexity(total_nll: float, token_count: int) -> float:
    """exp of the mean negative log-likelihood (in nats) per token; infinite where it exceeds a float.

    Raises:
        ValueError: No token, or `total_nll` is NaN.
    """
    if token_count < 1:
        raise ValueError(f"token_count={token_count} must be at least 1: perplexity needs scored tokens")
    if math.isnan(total_nll):
        raise ValueError("total_nll is NaN: the model's loss diverged")
    try:
        return math.exp(total_nll / token_count)
    except OverflowError:
        return math.inf
