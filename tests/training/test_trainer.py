"""One fit: killed anywhere it ends like an undisturbed one, keeps the best weights, and says when it went wrong."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from firstlab.methods.objective import RoutingObjective
from firstlab.training import modules
from firstlab.training.modules import Phase
from firstlab.training.trainer import AtomicCheckpointIO, read_checkpoint
from support.tiny_phase import TARGET, TinyPhase, weights

OURS = replace(TARGET, target_skip=None)
PAPER = RoutingObjective(objective="soft", gate="soft", pooled_tokens="sequence", multiplier=0.1)
HARD = replace(TARGET, gate="hard", multiplier=0.0, target_skip=0.2)


@pytest.fixture
def setup(tiny_model_dir: Path) -> TinyPhase:
    return TinyPhase(tiny_model_dir)


class Killed(BaseException):
    """Nothing catches it."""


# Where to kill: what is called, at which call since the step of the kill, and whether before or after it.
POINTS: dict[str, tuple[Any, str, int, bool]] = {
    "between the micro-batches of a step": (Phase, "training_step", 1, True),
    "before the optimizer's step": (Phase, "on_before_optimizer_step", 1, False),
    "before validation": (Phase, "on_validation_epoch_start", 1, False),
    "within validation": (Phase, "validation_step", 2, False),
    "after validation": (Phase, "on_validation_epoch_end", 1, True),
    "before last.ckpt is written": (AtomicCheckpointIO, "save_checkpoint", 1, False),
    "while last.ckpt is written": (os, "replace", 1, False),
    "after last.ckpt is written": (AtomicCheckpointIO, "save_checkpoint", 1, True),
}


class Log(DummyLogger):
    """Keeps the validations of a fit by step; what is validated again after a kill must be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.validations: dict[int, dict[str, float]] = {}
        self.trainer: Any = None

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "val/score" in metrics and self.trainer is not None and self.trainer.state.fn == "fit":
            found = metrics | {"step": step}
            assert self.validations.setdefault(self.trainer.global_step, found) == found


def end_of(module: Phase, log: Log) -> tuple[Any, ...]:
    """All that must not depend on kills."""
    [progress] = [each for each in module.trainer.callbacks if hasattr(each, "best_step")]
    found = (progress.best_step, progress.best_score, progress.waited, progress.stopped, progress.start_score)
    return (*found, module.multiplier, log.validations, {k: v.tolist() for k, v in weights(module).items()})


@pytest.mark.parametrize(
    ("name", "objective", "phase"),
    [
        ("lora", TARGET, {"validate_every": 2, "checkpoint_every": 2}),
        ("router", OURS, {"validate_every": 2, "checkpoint_every": 2, "patience": 1, "learning_rate": 3.0}),
        ("one", OURS, {"validate_every": 2, "checkpoint_every": 4, "accumulate": 1}),
        ("lora", PAPER, {"validate_every": 3, "checkpoint_every": 2, "accumulate": 1}),
        ("router", TARGET, {"validate_every": 2, "checkpoint_every": 1, "accumulate": 3, "learning_rate": 0.3}),
    ],
)
def test_a_phase_that_is_killed_anywhere_ends_like_an_undisturbed_one(
    name: str,
    objective: RoutingObjective,
    phase: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def fit(folder: str, log: Log, kill: tuple[Any, str, int, bool] | None = None, step: int = 0) -> Phase:
        tiny = TinyPhase(tiny_model_dir)
        module = tiny.module(name, objective, **phase)
        log.trainer = None
        monkeypatch.setattr(module, "on_fit_start", lambda: setattr(log, "trainer", module.trainer))
        if kill is None:
            tiny.fit(module, tmp_path / folder, [log])
            return module
        owner, method, left, after = kill
        original = getattr(owner, method)

        def killing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            training = "training" in method or "optimizer" in method
            due = module.trainer.state.fn == "fit" and module.trainer.global_step + training >= step
            left -= due
            if due and left == 0 and not after:
                raise Killed
            result = original(*args, **kwargs)
            if due and left == 0:
                raise Killed
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, method, killing)
            with pytest.raises(Killed):
                tiny.fit(module, tmp_path / folder, [log])
        return module

    undisturbed, log = fit("whole", whole := Log()), Log()
    step = phase["validate_every"] if phase.get("patience") else 4
    for kill in POINTS.values():
        fit("killed", log, kill, step)
    assert end_of(fit("killed", log), log) == end_of(undisturbed, whole)
    assert end_of(fit("killed", log), log) == end_of(undisturbed, whole)  # killed when it was through
    [progress] = [each for each in undisturbed.trainer.callbacks if hasattr(each, "best_step")]
    assert len(whole.validations) > 1 and progress.stopped == ("patience" in phase)


def test_checkpoints_hold_trainable_weights_only(setup: TinyPhase, tmp_path: Path):
    setup.fit(setup.module("router", OURS), tmp_path)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert set(checkpoint["state_dict"]) == {"model.routers.weight"}
    [moments] = checkpoint["optimizer_states"][0]["state"].values()
    assert moments["exp_avg"].shape == setup.model.routers.weight.shape
    assert (tmp_path / "last.ckpt").stat().st_size < 50_000


def fit_with_scores(setup: TinyPhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[int]) -> Any:
    """Trains with three validations whose scores are given; the first score is that of the start."""
    left = iter([*scores, *[99] * 10])
    monkeypatch.setattr(modules, "selection_score", lambda *_, **__: float(next(left)))
    module = setup.module("lora", HARD)
    return module, setup.fit(module, tmp_path)


def test_best_weights_by_validation_are_kept(setup: TinyPhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, kept = fit_with_scores(setup, tmp_path, monkeypatch, [9, 1, 2, 3])
    last = read_checkpoint(tmp_path / "last.ckpt")
    [best] = [each for each in last["callbacks"].values() if "best_step" in each]
    assert (best["best_step"], last["global_step"]) == (2, 6) and kept["warning"] is None
    name = next(k for k in best["best_weights"] if "lora_B" in k)
    assert not torch.equal(best["best_weights"][name], last["state_dict"][name])
    torch.testing.assert_close(module.state_dict()[name], best["best_weights"][name])


def test_the_start_is_kept_when_training_never_improves_on_it(
    setup: TinyPhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module, kept = fit_with_scores(setup, tmp_path, monkeypatch, [1, 2, 3, 4])
    assert all(not v.any() for k, v in module.state_dict().items() if "lora_B" in k)
    assert kept["warning"] == "did not improve on its start"


def test_early_stopping_counts_validations_without_improvement(
    setup: TinyPhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scores = iter(range(1, 100))
    monkeypatch.setattr(modules, "selection_score", lambda *_, **__: float(next(scores)))
    setup.fit(setup.module("lora", HARD, patience=2, validate_every=1), tmp_path)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


def test_a_damaged_checkpoint_is_named(setup: TinyPhase, tmp_path: Path):
    module = setup.module("router", OURS)
    setup.fit(module, tmp_path)
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last\.ckpt is truncated.*ckpt=none"):
        setup.fit(module, tmp_path)
    torch.save({"epoch": 0}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is of another program or version.*ckpt=none"):
        setup.fit(module, tmp_path)


@pytest.mark.parametrize(("micro_batch", "step"), [(2, 2), (11, 6)])
def test_training_that_diverges_keeps_what_validated_best_and_says_so(
    tiny_model_dir: Path, tmp_path: Path, micro_batch: int, step: int
):
    setup, settings = TinyPhase(tiny_model_dir), {"learning_rate": 0.001, "checkpoint_every": 5}
    module = setup.module("lora", replace(OURS, gate="hard"), **settings)
    start = module.on_train_batch_start

    def broken(batch: Any, index: int) -> Any:
        if index == micro_batch:  # an overflow in half precision, say
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(torch.nan)
        return start(batch, index)

    module.on_train_batch_start = broken
    kept = setup.fit(module, tmp_path)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert kept["val/score"] <= kept["start/score"]
    assert kept["warning"] == f"non-finite loss at step {step}"
    if step < 5:  # a run that resumes at 5 knows it, too
        setup = TinyPhase(tiny_model_dir)
        module = setup.module("lora", replace(OURS, gate="hard"), **settings)
        assert setup.fit(module, tmp_path)["warning"] == kept["warning"]


def test_a_learning_rate_that_is_far_too_high_is_noticed(setup: TinyPhase, tmp_path: Path):
    kept = setup.fit(setup.module("lora", HARD, learning_rate=1e8), tmp_path)
    assert kept["warning"] is not None and kept["val/score"] == kept["start/score"]


def test_a_signal_to_requeue_on_slurm_leaves_nothing_for_other_runs(
    setup: TinyPhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for name, value in {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "7", "NTASKS_PER_NODE": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    module = setup.module("router", OURS)
    start, before = module.on_train_batch_start, signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def signalled(batch: Any, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return start(batch, index)

    module.on_train_batch_start = signalled
    try:
        setup.fit(module, tmp_path / "run")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not list(tmp_path.rglob("hpc_ckpt*")) and {each.name for each in tmp_path.iterdir()} >= {"run"}
