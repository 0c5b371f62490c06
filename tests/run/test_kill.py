"""A run that is killed behind each of its steps ends as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from firstlab.run.experiment import Experiment
from firstlab.training.trainer import read_checkpoint
from support.tiny_run import composed, overrides

# Validation and checkpoint fall on the same steps, as they do by default, and the best step is not the last one.
COINCIDING = (
    "method.target_skip=0.25", "method.tolerance=1", "router_phase.learning_rate=0.03", "lora_phase.learning_rate=0.1",
    "lora_phase.max_steps=6",
    "router_phase.checkpoint_every=2", "lora_phase.checkpoint_every=2", "lora.dropout=0.1",
    "evaluation.limit=4", "evaluation.tpot_prompts=0",
)  # fmt: skip


# Behind these a kill leaves a run between two steps.
PLACES = ("last.ckpt", "router.yaml", "router", "router.jsonl", "lora.yaml")


class Killed(BaseException):
    """Nothing of ours catches it."""


def write_until_killed(monkeypatch: pytest.MonkeyPatch, directory: Path, seen: set[Any]) -> None:
    """Raise `Killed` once one of `PLACES` is there, another one than each time before."""

    def noted(replace: Any) -> Any:
        def run(source: Any, target: Any) -> Any:
            done = replace(source, target)
            file = Path(target)
            if directory in file.parents and file.name in PLACES:
                # A checkpoint is another one at every step.
                key = (file, read_checkpoint(file)["global_step"] if file.name == "last.ckpt" else None)
                if key not in seen:
                    seen.add(key)
                    raise Killed(key)
            return done

        return run

    monkeypatch.setattr(os, "replace", noted(os.replace))
    monkeypatch.setattr(Path, "rename", noted(Path.rename))


def test_a_run_killed_after_each_of_its_steps_ends_like_any_other(tiny_model_dir: Path, tmp_path: Path):
    whole, cut = (
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *COINCIDING, f"run_dir={tmp_path / name}")))
        for name in ("whole", "cut")
    )
    reference = whole.run()
    logged = map(json.loads, (whole.directory / "metrics.jsonl").read_text().splitlines())
    steps = [each["lora/val/score"] for each in logged if "lora/val/score" in each]  # 0, 2, 4, 6 and after the last
    assert steps[2] < min(steps[0], steps[1], steps[3]) and steps[2] == reference["phases"]["lora"]["val/score"]
    seen: set[Any] = set()
    while True:
        with pytest.MonkeyPatch.context() as patched:
            write_until_killed(patched, cut.directory, seen)
            try:
                record = Experiment(cut.config, cut.method).run()
                break
            except Killed:
                continue
    assert {file.name for file, _ in seen} == set(PLACES)
    assert sorted((file.parent.name, step) for file, step in seen if step is not None) == [
        ("lora", 2), ("lora", 4), ("lora", 6), ("router", 2), ("router", 4), ("router", 6),
    ]  # fmt: skip
    for name in ("router/routers.safetensors", "lora/adapter_model.safetensors", "predictions.jsonl"):
        assert (cut.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name
    assert json.dumps(record["variants"]) == json.dumps(reference["variants"])
    for phase in ("router", "lora"):
        for key in ("val/score", "multiplier"):
            assert record["phases"][phase][key] == reference["phases"][phase][key]
