"""What a phase says: how many prompts it reads, what went wrong, and what to lower when memory runs out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlab.config import build
from firstlab.config.command_line import ShortageError, guarded
from firstlab.run import context, phases
from firstlab.run.experiment import Experiment
from firstlab.run.report import report
from support.tiny_run import composed, overrides


def no_memory(*_: Any, **__: Any) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("module", "name", "step"),
    [
        (build.RouterAugmentedLM, "from_pretrained", "the loading of .*"),
        (phases, "start_phase_1", "the routers' calibration with evaluation.batch_size=4"),
        (phases, "fit_phase", "phase router with router_phase.batch_size=4"),
        (context, "evaluate_variant", "the evaluation of router with evaluation.batch_size=4"),
    ],
)
def test_memory_that_runs_out_says_where_and_what_to_lower(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, step: str
):
    monkeypatch.setattr(module, name, no_memory)
    given = ["method.target_skip=0.25", "router_phase.max_steps=1"]
    with pytest.raises(ShortageError, match=f"^out of GPU memory in {step}: lower the phase's batch_size .*dtype$"):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *given))).run()


def test_a_phase_that_went_wrong_is_marked_everywhere(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fit, warnings = phases.fit_phase, iter(["non-finite loss at step 2", None])
    monkeypatch.setattr(phases, "fit_phase", lambda *a, **k: {**fit(*a, **k), "warning": next(warnings)})
    small = ["router_phase.max_steps=1", "lora_phase.max_steps=1", "data.train_size=16", "evaluation.tpot_prompts=0"]
    small += ["method.target_skip=0.25", "method.calibration_prompts=128"]
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *small)))
    record = run.run()["phases"]
    assert record["router"]["warning"] == "non-finite loss at step 2" and "warning" not in record["lora"]
    report(run)
    said = capsys.readouterr()
    assert "warning: phase router: non-finite loss at step 2" in said.err.splitlines()
    marked = [line for line in said.out.splitlines() if line.startswith("warning: ")]
    assert marked == [
        f"warning: FiRST {name} (target 25 %): phase router: non-finite loss at step 2"
        for name in ("Router", "Router + LoRA")
    ]
    assert "calibrating the routers' start on 16 training prompts" in said.out.splitlines()


@pytest.mark.parametrize("method", ["sleb", "oracle", "random_skip", "shortgpt"])
def test_a_rate_that_rounds_to_no_layer_stops_before_training(tiny_model_dir: Path, tmp_path: Path, method: str):
    small = [x for x in overrides(tiny_model_dir, tmp_path) if not x.startswith("method.")]
    run = Experiment(*composed(f"method={method}", *small, "method.target_skip=0.1"))
    with pytest.raises(ValueError, match=r"method.target_skip=0.1 of 4 layers rounds to none: one layer is 0.25"):
        run.run()
    assert [x.name for x in run.directory.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("given", ["note=" + 250 * "x", "run_dir=" + 252 * "x", "runs=" + 420 * "0123456789/"])
def test_names_that_are_too_long_stop_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        guarded(lambda _: Experiment(*composed(given)).run())(None)
    said = capsys.readouterr().err.strip()
    assert re.match(r"error: (a name is longer than the file system|.* cannot be written \(File name too long\))", said)
    assert not any(each.is_file() for each in tmp_path.rglob("*"))
