"""Every method that decides once per prompt, or once for all, from the command line's configuration to result.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from firstlab import results
from firstlab.build import build_data, load_run
from firstlab.experiment import Experiment
from firstlab.routes import decided_routes
from firstlab.training.prompt_set import PromptSet
from tiny_run import composed, overrides

# Method, its settings, skipped layers of 4 at 25 % (None: the routers' choice), routes by prompt.
RUNS = [
    ("random_skip", ["method.draw=prompt"], 1, True),
    ("oracle", ["lora_phase.max_steps=2"], 1, True),
    ("static_first", ["method.vote_prompts=8", "method.calibration_prompts=4"], None, False),
    ("random_skip", ["method.draw=run"], 1, False),
    ("unified_skip", [], 1, False),
    ("shortgpt", ["method.calibration_prompts=4"], 1, False),
    ("sleb", ["method.calibration_prompts=4"], 1, False),
]


@pytest.mark.parametrize(("method", "settings", "count", "by_prompt"), RUNS)
def test_a_method_runs_end_to_end(
    tiny_model_dir: Path, tmp_path: Path, method: str, settings: list[str], count: int | None, by_prompt: bool
):
    small = [x for x in overrides(tiny_model_dir, tmp_path) if not x.startswith("method.")]
    arguments = [f"method={method}", *small, "method.target_skip=0.25", "evaluation.tpot_prompts=0", *settings]
    run = Experiment(*composed(*arguments))
    record = run.run()

    assert set(record["variants"]) == {"router", "router_lora"}
    assert record["phases"]["lora"]["steps"] > 0
    for variant in record["variants"].values():
        skip = variant["skip"]
        if count is not None:
            assert skip["skip_rate"] == count / 4 and record["rounding"] == "1 of 4 layers = 25.0 % for 25 %"
        assert skip["unique_routes"] == 1 or by_prompt
        assert skip["mode_agreement"] == 1 or by_prompt
        assert variant["perplexity"] > 1
    assert (record["fixed_routes"] is None) == by_prompt
    assert results.read(run.directory) == json.loads(json.dumps(record))

    # A saved run decodes as it did when it was evaluated.
    config, loaded, model, variant = load_run(run.directory, None)
    assert variant == "router_lora"
    data = build_data(config)
    routes = decided_routes(run.directory, loaded, variant, PromptSet(model, data, data.test, 4))
    assert isinstance(routes, torch.Tensor)
    lines = [json.loads(x) for x in (run.directory / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        route = routes[line["index"]] if by_prompt else routes
        assert line["skipped"] == (~route).nonzero()[:, 0].tolist()
