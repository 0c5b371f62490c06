"""A run that is killed whenever it has written something ends as if nothing had happened."""

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
    "method.target_skip=0.25", "router_phase.learning_rate=0.3", "lora_phase.learning_rate=0.3",
    "router_phase.checkpoint_every=2", "lora_phase.checkpoint_every=2", "lora.dropout=0.1",
    "evaluation.limit=4", "evaluation.tpot_prompts=0",
)  # fmt: skip


class Killed(BaseException):
    """Nothing of ours catches it."""


def write_until_killed(monkeypatch: pytest.MonkeyPatch, directory: Path, seen: set[Any]) -> None:
    """Raise `Killed` behind the first file or folder put in place that has not been the last one before."""

    def noted(replace: Any) -> Any:
        def run(source: Any, target: Any) -> Any:
            done = replace(source, target)
            file = Path(target)
            if directory in file.parents:
                # A checkpoint is another one at every step.
                key = (file, read_checkpoint(file)["global_step"] if file.suffix == ".ckpt" else None)
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
    seen: set[Any] = set()
    while True:
        with pytest.MonkeyPatch.context() as patched:
            write_until_killed(patched, cut.directory, seen)
            try:
                record = Experiment(cut.config, cut.method).run()
                break
            except Killed:
                continue
    places = [str(file.relative_to(cut.directory)) for file, _ in seen]
    assert {"router.yaml", "router", "lora.yaml", "lora", "predictions/router.jsonl", "result.json"} <= set(places)
    assert places.count("checkpoints/router/last.ckpt") == 3 and places.count("checkpoints/lora/last.ckpt") == 2
    for name in ("router/routers.safetensors", "lora/adapter_model.safetensors", "predictions.jsonl"):
        assert (cut.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name
    assert json.dumps(record["variants"]) == json.dumps(reference["variants"])
    for phase in ("router", "lora"):
        for key in ("val/score", "multiplier"):
            assert record["phases"][phase][key] == reference["phases"][phase][key]
