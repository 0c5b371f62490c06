"""Every method that decides once per prompt, or once for all, from the command line's configuration to result.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from firstlab import evaluate, generate
from firstlab.config.build import build_data, load_model
from firstlab.data.encoding import PromptRows, TrainingRows
from firstlab.model.routes import FixedRoutes
from firstlab.run.decisions import decided_routes
from firstlab.run.experiment import Experiment
from firstlab.run.load import load_run
from firstlab.store import results
from firstlab.training.prompt_set import PromptSet
from support.reference import without_layers
from support.tiny_run import composed, overrides

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
    assert isinstance(routes, FixedRoutes)
    lines = [json.loads(x) for x in (run.directory / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        route = routes.ran[line["index"]] if by_prompt else routes.ran
        assert line["skipped"] == (~route).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("method", ["sleb", "shortgpt"])
def test_a_method_that_skips_in_prefill_is_the_model_without_the_layers(
    tiny_model_dir: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
):
    small = overrides(tiny_model_dir, tmp_path, "method.target_skip=0.5", "method.skip_prefill=true")
    run = Experiment(*composed(f"method={method}", *small))
    record = run.run()
    assert run.directory.name == f"{method}-skip0.5-prefill-seed0" and record["rounding"].startswith("2 of 4 layers")
    trained = [json.loads(x) for x in (run.directory / "metrics.jsonl").read_text().splitlines()]
    assert {x["lora/train/skip_rate"] for x in trained if "lora/train/skip_rate" in x} == {0.5}
    assert {variant["skip"]["skip_rate"] for variant in record["variants"].values()} == {0.5}

    # Without LoRA: text and perplexity of the base whose layers are deleted.
    config, _ = composed(f"method={method}", *small)
    data, kept = build_data(config), torch.tensor(record["fixed_routes"]["pruned"])
    smaller = without_layers(load_model(config, tiny_model_dir).unwrap(), kept)
    rows = PromptRows(data.task, data.test, data.tokenizer, data.max_prompt_length)
    lines = [json.loads(x) for x in (run.directory / "predictions.jsonl").read_text().splitlines()]
    for index, line in enumerate(line for line in lines if line["variant"] == "router"):
        ids = torch.tensor([rows[index].prompt])
        out = smaller.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        assert line["text"] == data.tokenizer.decode(out, skip_special_tokens=True).strip()
        assert line["skipped"] == (~kept).nonzero()[:, 0].tolist()
    loss, tokens = 0.0, 0
    references = TrainingRows(data.task, data.test, data.tokenizer, data.max_length)
    for row in (references[i] for i in range(len(data.test))):
        ids = torch.tensor([[*row.prompt, *row.response]])
        with torch.no_grad():
            said = smaller(ids).logits[0, len(row.prompt) - 1 : -1].log_softmax(-1)
        loss -= float(said.gather(1, torch.tensor(row.response)[:, None]).sum())
        tokens += len(row.response)
    assert record["variants"]["router"]["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-4)

    # With LoRA, as a saved run.
    evaluate.main([f"run={run.directory}", "variant=router_lora"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    variant = results.read(Path(again["record"]).parent)["variants"]["router_lora"]
    for key in ("perplexity", "metrics", "skip"):
        assert variant[key] == record["variants"]["router_lora"][key]
    generate.main([f"run={run.directory}", "Ein Haus"])
    assert "skipped 2 of 4 (50.0 %)" in capsys.readouterr().out
