"""A run directory that a kill or a hand has damaged: what is made again equals what was there, the rest is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from firstlab.run.decisions import shared_routes, static_routes
from firstlab.run.directory import phase_record
from firstlab.run.experiment import Experiment
from firstlab.run.report import neighbours
from support.tiny_run import composed, overrides

FOUR_LAYERS = SimpleNamespace(num_layers=4)


def evaluated(run: Path, tiny_model_dir: Path, *extra: str) -> Experiment:
    given = overrides(tiny_model_dir, run.parent, "method.target_skip=0.25", f"run_dir={run}", "phases=[evaluate]")
    return Experiment(*composed(*given, *extra))


@pytest.fixture
def unrecorded(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, before its last step."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "result.json").unlink()
    return run


def test_predictions_and_evaluations_that_are_damaged_are_made_again(
    finished: Path, unrecorded: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    part, lora = (unrecorded / "predictions" / f"{name}.0.part" for name in ("router", "router_lora"))
    lines = part.read_text().splitlines(keepends=True)
    lines[2] = lines[2][:20] + "\n"  # in the middle
    lines[4] = json.dumps({**json.loads(lines[4]), "text": None}) + "\n"
    part.write_text("".join(lines)[:-9])
    (unrecorded / "evaluation" / "router.yaml").write_text("n: 7\nskip:")
    # Of other test prompts, of which there are predictions as well.
    lora.write_text(lora.read_text().replace("\n", "0\n", 1).replace('"text": "', '"text": "other '))
    whole = unrecorded / "predictions" / "router_lora.jsonl"
    whole.write_text("".join(whole.read_text().splitlines(keepends=True)[:3]))
    again = evaluated(unrecorded, tiny_model_dir).run()
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [Path(file).name for file in said if file.endswith("yaml")] == ["router.yaml", "router_lora.yaml"]
    assert (unrecorded / "predictions.jsonl").read_text() == (finished / "predictions.jsonl").read_text()
    before = json.loads((finished / "result.json").read_text())["variants"]
    for name, variant in again["variants"].items():
        assert {**variant, "timing": 0} == {**before[name], "timing": 0}


def test_predictions_of_other_weights_or_routes_are_made_again(
    finished: Path, unrecorded: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """LoRA that somebody put in the place of the run's own: what was said with the former one does not count."""
    before = json.loads((finished / "result.json").read_text())["variants"]
    file = unrecorded / "lora" / "adapter_model.safetensors"
    save_file({name: weight + 0.2 for name, weight in load_file(file).items()}, file)
    config = json.loads((unrecorded / "lora" / "config.json").read_text())
    config["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    (unrecorded / "lora" / "config.json").write_text(json.dumps(config))
    after = evaluated(unrecorded, tiny_model_dir).run()["variants"]
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [Path(each).name.rstrip(":") for each in said] == ["router_lora.yaml", "router_lora.0.part"]
    assert after["router"] == before["router"]
    assert after["router_lora"]["source"] != before["router_lora"]["source"]
    assert after["router_lora"]["perplexity"] != before["router_lora"]["perplexity"]


def test_lora_without_its_weights_is_not_evaluated_as_lora(unrecorded: Path, tiny_model_dir: Path):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (unrecorded / "lora" / name).unlink()
    with pytest.raises(ValueError, match=r"lora\b.*delete .*training command again"):
        evaluated(unrecorded, tiny_model_dir).run()
    assert not (unrecorded / "result.json").exists()


def test_a_phase_that_is_trained_again_is_evaluated_again(unrecorded: Path, tiny_model_dir: Path):
    shutil.rmtree(unrecorded / "router")
    with pytest.raises(ValueError, match=r"has lora/ but not router/.* delete lora/, and result.json if"):
        evaluated(unrecorded, tiny_model_dir, "phases=[router,lora]").run()
    shutil.rmtree(unrecorded / "lora")
    evaluated(unrecorded, tiny_model_dir, "phases=[router,lora]").run()
    left = [
        str(x.relative_to(unrecorded)) for x in unrecorded.rglob("*") if x.parent.name in ("evaluation", "predictions")
    ]
    assert left == []


DAMAGE = ["", "[", "[]", "{}", "steps: x\nmultiplier: 0\nseconds: 0\n", "\x00", '{"steps": 1}']


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_record_of_a_phase_is_named(tmp_path: Path, text: str):
    assert phase_record(tmp_path, "router") is None
    (tmp_path / "router").mkdir()
    for _ in range(2):  # missing, then damaged
        with pytest.raises(ValueError, match=r"router.yaml is missing or damaged .*; delete it and .*/router, and "):
            phase_record(tmp_path, "router")
        (tmp_path / "router.yaml").write_text(text)


@pytest.mark.parametrize("text", ["", "{", "3", "[1, [2]]", "[true]", '{"pruned": [0]}', '{"schedule": null}', '"x"'])
def test_a_damaged_decision_is_named(tmp_path: Path, text: str):
    _, method = composed("method=sleb")
    (tmp_path / "routes.json").write_text(text)
    with pytest.raises(ValueError, match=r"routes.json is missing or damaged \(.*; delete it, and result.json if"):
        shared_routes(tmp_path, method, FOUR_LAYERS)


@pytest.mark.parametrize("text", ["", "[1", "{}", "[]", "[0, 0]", "[9, 1]", '["a"]', "null", "[1.5]"])
def test_a_damaged_order_of_layers_is_named(tmp_path: Path, text: str):
    method = composed("method.target_skip=0.375")[1]
    assert static_routes(tmp_path, method, 4) is None
    (tmp_path / "start.json").write_text("[2, 1]")
    assert torch.equal(static_routes(tmp_path, method, 4), torch.tensor([True, True, False, True])) is False
    (tmp_path / "start.json").write_text(text)
    with pytest.raises(ValueError, match=r"start.json is missing or damaged \(.*; delete it, and result.json if"):
        static_routes(tmp_path, method, 4)


def test_a_damaged_record_beside_a_run_is_left_out(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, damaged = (json.loads((finished / "result.json").read_text()) for _ in range(2))
    del damaged["variants"]["router"]["primary_metric"]
    texts = [json.dumps(good), json.dumps(damaged), '{"conf', "[]", json.dumps(good)]
    for name, text in zip("abcde", texts, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(text)
    assert len(neighbours(tmp_path / "a", good)) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in said] == [str(tmp_path / name / "result.json") for name in "bcd"]
