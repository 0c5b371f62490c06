"""Both phases on a tiny model: what is trained, what is kept, and that an interrupted run ends like any other."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from firstlab.config.build import build_data, load_model
from firstlab.methods.objective import RoutingObjective
from firstlab.model import LoraSettings
from firstlab.training import modules
from firstlab.training.calibration import losses_under_routes, start_routers
from firstlab.training.modules import LoRACompensationModule, OptimizerSettings, RouterModule
from firstlab.training.trainer import FitSettings, fit_phase, read_checkpoint
from support.tiny_run import composed, overrides


def settings(**changes: Any) -> FitSettings:
    values = {
        "accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true",
        "accumulate": 2, "max_steps": 6, "gradient_clip": 1.0, "validate_every": 2, "checkpoint_every": 1,
        "patience": None, "progress_bar": False,
    }  # fmt: skip
    return FitSettings(**{**values, **changes})


class Setup:
    """Model, data and modules of a small run."""

    def __init__(self, model_dir: Path, runs: Path) -> None:
        config, _ = composed(*overrides(model_dir, runs))
        self.data = build_data(config)
        self.data.batch_size, self.data.loss_on, self.data.total_batches = 4, "response", 12
        self.model = load_model(config, model_dir)

    def module(self, phase: str, objective: RoutingObjective, learning_rate: float = 0.01) -> Any:
        optimizer = OptimizerSettings(learning_rate, 0.0, 0.1, 6)
        if phase == "router":
            return RouterModule(self.model, objective, optimizer, seed=3)
        torch.manual_seed(0)
        self.model.add_lora(LoraSettings(rank=2, dropout=0.1))
        return LoRACompensationModule(self.model, objective, optimizer, seed=3)


@pytest.fixture
def setup(tiny_model_dir: Path, tmp_path: Path) -> Setup:
    return Setup(tiny_model_dir, tmp_path)


OURS = RoutingObjective("decode_consistent", "bernoulli", "prompt", 0.1, None)
PAPER = RoutingObjective("soft", "soft", "sequence", 0.1, None)


def trained(module: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("objective", [OURS, PAPER], ids=["decode_consistent", "soft"])
def test_phase_1_changes_the_routers_and_nothing_else(setup: Setup, tmp_path: Path, objective: RoutingObjective):
    module = setup.module("router", objective)
    before = trained(module)
    kept = fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    changed = {k for k, v in trained(module).items() if not torch.equal(v, before[k])}
    assert changed == {"model.routers.weight"}
    assert 0 <= kept["val/skip_rate"] <= 1 and kept["val/cross_entropy"] > 0


def test_phase_2_changes_lora_and_nothing_else(setup: Setup, tmp_path: Path):
    module = setup.module("lora", OURS)
    before = trained(module)
    fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    changed = {k for k, v in trained(module).items() if not torch.equal(v, before[k])}
    assert changed and all("lora_" in k for k in changed)
    lora = {k for k in before if "lora_B" in k}
    assert lora <= changed, "every adapter of every layer learns"


def test_distillation_compares_with_the_dense_base_model(setup: Setup, tmp_path: Path):
    module = setup.module("lora", replace(OURS, distill=1.0)).eval()
    rows = setup.data.train_dataloader()
    batch = next(iter(rows))
    out = module._routed(batch, None)
    every = torch.ones(setup.model.num_layers, dtype=torch.bool)
    same = module._divergence(module._routed(batch, every), batch)
    assert same.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in setup.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert module._divergence(module._routed(batch, every), batch).item() > 1e-3
    assert module._divergence(out, batch).item() >= 0
    kept = fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    assert kept["val/cross_entropy"] > 0


def test_routes_are_held_against_what_lora_does_to_the_prompt(setup: Setup, tmp_path: Path):
    module = setup.module("lora", replace(OURS, hold_routes=1e4)).eval()
    batch = next(iter(setup.data.train_dataloader()))
    assert module._drift(module._routed(batch, None), batch).item() < 1e-12
    with torch.no_grad():
        for name, parameter in setup.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    moved = module._drift(module._routed(batch, None), batch).item()
    kept = fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    module.eval()
    assert module._drift(module._routed(batch, None), batch).item() < moved
    assert kept["val/cross_entropy"] > 0


@pytest.mark.parametrize("other", ["objective=soft", "one_phase=true"])
def test_routes_are_held_only_after_a_phase_1_of_the_same_kind(other: str):
    with pytest.raises(ValueError, match=r"method\.hold_routes=1\.0 holds routes of a phase 1"):
        composed("method.hold_routes=1.0", f"method.{other}")
    held = [
        composed(*each)[1].training_objective("lora").hold_routes
        for each in ([f"method.{other}"], ["method.hold_routes=0"], [])
    ]
    assert held == [0, 0, 10]


def test_checkpoints_hold_trainable_weights_only(setup: Setup, tmp_path: Path):
    fit_phase(setup.module("router", OURS), setup.data, settings(), tmp_path, [], resume=True)
    checkpoint = read_checkpoint(tmp_path / "last.ckpt")
    assert set(checkpoint["state_dict"]) == {"model.routers.weight"}
    [moments] = checkpoint["optimizer_states"][0]["state"].values()
    assert moments["exp_avg"].shape == setup.model.routers.weight.shape
    assert (tmp_path / "last.ckpt").stat().st_size < 50_000


class _Kill(RuntimeError):
    pass


class _KillAt(L.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise _Kill


@pytest.mark.parametrize("phase", ["router", "lora"])
def test_an_interrupted_phase_ends_exactly_like_an_uninterrupted_one(
    tiny_model_dir: Path, tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
):
    objective = RoutingObjective("decode_consistent", "bernoulli", "prompt", 0.1, target_skip=0.3, dual_rate=0.5)
    whole = Setup(tiny_model_dir, tmp_path)
    reference = whole.module(phase, objective)
    fit_phase(reference, whole.data, settings(), tmp_path / "whole", [], resume=True)

    first = Setup(tiny_model_dir, tmp_path)
    module = first.module(phase, objective)
    monkeypatch.setattr(type(module), "configure_callbacks", lambda self: [_KillAt(3)])
    with pytest.raises(_Kill):
        fit_phase(module, first.data, settings(), tmp_path / "cut", [], resume=True)
    monkeypatch.undo()
    second = Setup(tiny_model_dir, tmp_path)
    resumed = second.module(phase, objective)
    fit_phase(resumed, second.data, settings(), tmp_path / "cut", [], resume=True)

    assert resumed.multiplier == reference.multiplier
    for name, value in trained(reference).items():
        torch.testing.assert_close(trained(resumed)[name], value, rtol=0, atol=0, msg=name)


def fit_with_scores(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[int]) -> Any:
    """Trains with three validations whose scores are given; the first score is that of the start."""
    left = iter([*scores, *[99] * 10])
    monkeypatch.setattr(modules, "selection_score", lambda *_: float(next(left)))
    module = setup.module("lora", RoutingObjective("decode_consistent", "hard", "prompt", 0.0, target_skip=0.2))
    fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    return module


def test_best_weights_by_validation_are_kept(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = fit_with_scores(setup, tmp_path, monkeypatch, [9, 1, 2, 3])
    best, last = (read_checkpoint(tmp_path / f"{name}.ckpt") for name in ("best", "last"))
    assert (best["global_step"], last["global_step"]) == (2, 6)
    name = next(k for k in best["state_dict"] if "lora_B" in k)
    assert not torch.equal(best["state_dict"][name], last["state_dict"][name])
    torch.testing.assert_close(module.state_dict()[name], best["state_dict"][name])


def test_the_start_is_kept_when_training_never_improves_on_it(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = fit_with_scores(setup, tmp_path, monkeypatch, [1, 2, 3, 4])
    assert all(not v.any() for k, v in module.state_dict().items() if "lora_B" in k)


def test_early_stopping_counts_validations_without_improvement(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scores = iter(range(1, 100))
    monkeypatch.setattr(modules, "selection_score", lambda *_: float(next(scores)))
    module = setup.module("lora", RoutingObjective("decode_consistent", "hard", "prompt", 0.0, target_skip=0.2))
    fit_phase(module, setup.data, settings(patience=2, validate_every=1), tmp_path, [], resume=True)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 3


def test_a_truncated_checkpoint_is_named(setup: Setup, tmp_path: Path):
    module = setup.module("router", OURS)
    fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"last\.ckpt is truncated.*ckpt=none"):
        fit_phase(setup.module("router", OURS), setup.data, settings(), tmp_path, [], resume=True)


def test_training_that_diverges_keeps_what_validated_best(setup: Setup, tmp_path: Path):
    module = setup.module("lora", replace(OURS, gate="hard"), learning_rate=0.001)
    start = module.on_train_batch_start

    def broken(batch: Any, index: int) -> Any:
        if index == 8:  # an overflow in half precision, say
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(torch.nan)
        return start(batch, index)

    module.on_train_batch_start = broken
    kept = fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert kept["val/score"] == pytest.approx(min(kept["start/score"], best_score(tmp_path)))


def best_score(folder: Path) -> float:
    return float(read_checkpoint(folder / "best.ckpt")["val_score"])


def test_a_signal_to_requeue_on_slurm_leaves_nothing_for_other_runs(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        fit_phase(module, setup.data, settings(), tmp_path / "run", [], resume=True)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not list(tmp_path.rglob("hpc_ckpt*")) and {each.name for each in tmp_path.iterdir()} >= {"run"}


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_a_calibrated_start_lies_around_the_threshold(tiny_model_dir: Path, tmp_path: Path, threshold: float):
    config, _ = composed(*overrides(tiny_model_dir, tmp_path, f"router.threshold={threshold}"))
    setup = Setup(tiny_model_dir, tmp_path)
    setup.model = load_model(config, tiny_model_dir)
    batches = calibration_batches(setup)
    for order, rate in (([], 0.0), ([1], 0.25), ([1, 3], 0.375)):
        start_routers(setup.model, batches, order, rate, margin=0.2)
        routes = torch.cat([setup.model.route(b["input_ids"], b["prompt_mask"]) for b in batches])
        # Of a layer that a share of the prompts skips, two prompts may cross the threshold together.
        assert 1 - routes.float().mean().item() == pytest.approx(rate, abs=1 / routes.numel())
        assert len(routes.unique(dim=0)) == (1 if rate < 0.3 else 2)


def calibration_batches(setup: Setup) -> list[dict[str, torch.Tensor]]:
    return [{k: v for k, v in batch.items() if k != "index"} for batch in setup.data.val_dataloader()]


def test_a_calibrated_start_gives_the_wanted_routes_and_margins(setup: Setup):
    batches = calibration_batches(setup)
    start_routers(setup.model, batches, order=[1, 3], skip_rate=0.5, margin=0.2)
    routes = torch.tensor([True, False, True, False])
    for batch in batches:
        rho = setup.model.prompt_rho(batch["input_ids"], batch["prompt_mask"])
        assert torch.equal(setup.model.routers.decide(rho), routes.expand_as(rho))
        torch.testing.assert_close(rho.mean(0), torch.where(routes, 0.7, 0.3), atol=0.08, rtol=0)


def test_a_rate_between_two_layers_is_met_by_skipping_one_for_some_prompts(setup: Setup):
    batches = calibration_batches(setup)
    start_routers(setup.model, batches, order=[1, 3], skip_rate=0.375, margin=0.2)
    routes = torch.cat([setup.model.route(b["input_ids"], b["prompt_mask"]) for b in batches])
    assert (~routes).float().mean(0).tolist() == [0, 1, 0, 0.5]
    assert 1 - routes.float().mean() == 0.375


def test_calibration_loss_is_the_loss_of_the_routed_model(setup: Setup):
    batch = {k: v for k, v in next(iter(setup.data.val_dataloader())).items() if k != "index"}
    routes = torch.tensor([True, False, True, True])
    labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
    out = setup.model(**{**batch, "labels": labels}, objective="decode_consistent", routes=routes)
    sums, counts = losses_under_routes(setup.model, [batch], routes)
    assert float(sums.sum() / counts.sum()) == pytest.approx(out.loss.item(), rel=1e-5)
    sums, _ = losses_under_routes(setup.model, [batch], ~routes)
    assert float(sums.sum() / counts.sum()) != pytest.approx(out.loss.item(), rel=1e-3)


def test_target_skip_moves_the_hard_rate_towards_the_target(setup: Setup, tmp_path: Path):
    objective = RoutingObjective("decode_consistent", "soft", "prompt", 0.0, target_skip=0.5, dual_rate=5.0)
    batches = [{k: v for k, v in next(iter(setup.data.val_dataloader())).items() if k != "index"}]
    start_routers(setup.model, batches, [], 0.0, margin=0.01)
    module = setup.module("router", objective, learning_rate=0.02)
    kept = fit_phase(module, setup.data, settings(), tmp_path, [], resume=True)
    assert kept["val/skip_rate"] > 0.2
