"""Result records as `firstlab.train` writes them, with made-up numbers, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from firstlab.config.compose import composed_config
from firstlab.config.grid import Run
from firstlab.metrics import Scores, bootstrap_interval
from firstlab.store import results

METRIC = {"mini_qa": ("f1", "em"), "mini_summarization": ("rougeL", "rouge1")}
LAYERS = 16


def record(
    run: Run, *, quality: float = 70.0, rate: float | None = None, seed: int = 0, prompts: int = 60, noise: float = 8.0
) -> dict[str, Any]:
    """A record of the run whose every metric is about `quality`, 5 more with LoRA.

    Prompts are equally hard for all runs of a seed, as those of one test set are: paired tests see it.
    """
    names = METRIC.get(run.task, ("f1", "em"))
    variants = {}
    for plus, variant in enumerate(("base", "base_lora") if run.method == "none" else ("router", "router_lora")):
        base = np.random.default_rng(0).normal(0, 15, prompts)
        own = np.random.default_rng([seed, int(quality * 10), plus]).normal(quality + 5 * plus, noise, prompts)
        values = np.clip(base + own, 0, 100)
        metrics, packed = {}, {}
        for name in names:
            scores = Scores.mean(values)
            low, high = bootstrap_interval(scores, resamples=100)
            metrics[name] = {"value": scores.value, "low": low, "high": high, "n": prompts, "signature": None}
            packed[name] = results.pack(scores.rows)
        skipped = np.zeros(LAYERS)
        wanted = (run.level or 0.0) if rate is None else rate
        skipped[3 : 3 + int(wanted * LAYERS)] = 1
        skipped[3 + int(wanted * LAYERS)] = wanted * LAYERS % 1
        hard = np.arange(prompts) % 5 + 1
        variants[variant] = {
            "n": prompts,
            "skip": {
                "skip_rate": wanted, "per_layer": skipped.tolist(), "unique_routes": 3, "route_entropy_bits": 0.8,
                "by_difficulty": {},
            },
            "perplexity": 1.5, "metrics": metrics, "primary_metric": names[0],
            "timing": {"tpot_ratio": 1 - 0.9 * wanted, "tpot_ratio_quartiles": [0.8 - 0.8 * wanted, 1]},
            "examples": {
                "test_set": f"set-{run.task}", "difficulty": results.pack(hard),
                "prompt_tokens": results.pack(30 + 7 * hard), "skip_rate": results.pack(wanted * (1.2 - 0.07 * hard)),
                "nll": results.pack(0.4 * hard + 0.25), "response_tokens": results.pack(np.full(prompts, 4)),
                "scores": packed,
            },
        }  # fmt: skip
    config = composed_config(run.overrides)
    return {
        "method": run.method, "label": run.method, "level": f"target {100 * (run.level or 0):g} %", "model": run.model,
        "data": run.task, "directory": "x", "config": config, "config_hash": f"{hash((run, quality, rate)):x}",
        "seed": seed, "num_layers": LAYERS, "variants": variants,
    }  # fmt: skip


def save(folder: Path, name: str, node: dict[str, Any]) -> Path:
    """As a recorded result."""
    file = folder / "results" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(node), encoding="utf-8")
    return file
