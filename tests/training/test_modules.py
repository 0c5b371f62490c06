"""Both phases on a tiny model: what is trained, and by which loss."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firstlab.methods.objective import RoutingObjective
from firstlab.model.routes import FixedRoutes
from firstlab.training.calibration import start_routers
from firstlab.training.equations import distillation_losses, dual_step, lora_loss, router_loss, selection_score
from firstlab.training.modules import Phase
from firstlab.training.prompt_set import PromptSet
from support.tiny_phase import TinyPhase, weights
from support.tiny_run import composed

OURS = RoutingObjective(objective="decode_consistent", gate="bernoulli", pooled_tokens="prompt", multiplier=0.1)
PAPER = RoutingObjective(objective="soft", gate="soft", pooled_tokens="sequence", multiplier=0.1)


@pytest.fixture
def setup(tiny_model_dir: Path) -> TinyPhase:
    return TinyPhase(tiny_model_dir)


@pytest.mark.parametrize("objective", [OURS, PAPER], ids=["decode_consistent", "soft"])
def test_phase_1_changes_the_routers_and_nothing_else(setup: TinyPhase, tmp_path: Path, objective: RoutingObjective):
    module = setup.module("router", objective)
    before = weights(module)
    kept = setup.fit(module, tmp_path)
    changed = {k for k, v in weights(module).items() if not torch.equal(v, before[k])}
    assert changed == {"model.routers.weight"}
    assert 0 <= kept["val/skip_rate"] <= 1 and kept["val/cross_entropy"] > 0


@pytest.mark.parametrize("name", ["router", "lora"])
@pytest.mark.parametrize("objective", [OURS, PAPER], ids=["decode_consistent", "soft"])
def test_no_step_waits_for_the_device(
    setup: TinyPhase, monkeypatch: pytest.MonkeyPatch, name: str, objective: RoutingObjective
):
    # transformers asks once whether there is padding.
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # torch refuses to answer for this device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    device = torch.device("meta")  # it has no values that anybody could wait for
    module = setup.module(name, objective).to(device).cpu()
    module.held_rho = torch.zeros(len(setup.data.train), setup.model.num_layers)
    batch = module.transfer_batch_to_device(next(iter(setup.data.train_dataloader())), device, 0)
    out = module._routed(batch, None)
    assert out.loss is not None and out.loss.device == device
    (out.loss + module._drift(out, batch) + module._divergence(out, batch)).backward()
    assert module._hard_skip_rate(out, batch, None).device == device
    routes = FixedRoutes(torch.ones(setup.model.num_layers, dtype=torch.bool)).to(device)
    assert module._hard_skip_rate(module._routed(batch, routes), batch, routes).device == device


def test_phase_2_changes_lora_and_nothing_else(setup: TinyPhase, tmp_path: Path):
    module = setup.module("lora", OURS)
    before = weights(module)
    setup.fit(module, tmp_path)
    changed = {k for k, v in weights(module).items() if not torch.equal(v, before[k])}
    assert changed and all("lora_" in k for k in changed)
    lora = {k for k in before if "lora_B" in k}
    assert lora <= changed, "every adapter of every layer learns"


def test_distillation_compares_with_the_dense_base_model(setup: TinyPhase, tmp_path: Path):
    module = setup.module("lora", OURS, distill=1.0).eval()
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
    kept = setup.fit(module, tmp_path)
    assert kept["val/cross_entropy"] > 0


def test_routes_are_held_against_what_lora_does_to_the_prompt(setup: TinyPhase, tmp_path: Path):
    module = setup.module("lora", replace(OURS, hold_routes=1e4)).eval()
    batch = next(iter(setup.data.train_dataloader()))
    assert module._drift(module._routed(batch, None), batch).item() < 1e-12
    with torch.no_grad():
        for name, parameter in setup.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    moved = module._drift(module._routed(batch, None), batch).item()
    kept = setup.fit(module, tmp_path)
    module.eval()
    assert module._drift(module._routed(batch, None), batch).item() < moved
    assert kept["val/cross_entropy"] > 0


def test_validation_goes_on_where_memory_runs_out(
    setup: TinyPhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    objective = replace(OURS, target_skip=0.3)
    whole = setup.fit(setup.module("router", objective), tmp_path / "whole")
    measured = Phase._measured

    def scarce(self: Phase, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measured(self, batch)

    monkeypatch.setattr(Phase, "_measured", scarce)
    torch.manual_seed(0)
    setup = TinyPhase(setup.directory)
    halved = setup.fit(setup.module("router", objective), tmp_path / "halved")
    assert {k: v for k, v in halved.items() if k != "warning"} == pytest.approx(
        {k: v for k, v in whole.items() if k != "warning"}, rel=1e-4
    )
    assert "going on with 1 rows" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):  # the paper's stopping rule weighs batches
        setup.fit(setup.module("router", PAPER), tmp_path / "paper")


def test_rho_that_was_read_before_is_the_rho_of_each_step(setup: TinyPhase):
    module = setup.module("lora", replace(OURS, hold_routes=10.0)).eval()
    with torch.no_grad():
        for name, parameter in setup.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    batch = next(iter(setup.data.train_dataloader()))
    out = module._routed(batch, None)
    beside = module._drift(out, batch)
    module.held_rho = PromptSet(setup.model, setup.data, setup.data.train, 8).rho()
    torch.testing.assert_close(module._drift(out, batch), beside)
    assert beside.item() > 1e-8


@pytest.mark.parametrize("name", ["router", "lora"])
def test_mixed_precision_trains_what_full_precision_trains(setup: TinyPhase, tmp_path: Path, name: str):
    objective = replace(OURS, hold_routes=10.0)
    full = setup.fit(setup.module(name, objective), tmp_path / "full")
    mixed = TinyPhase(setup.directory)
    module = mixed.module(name, objective)
    before = weights(module)
    kept = mixed.fit(module, tmp_path / "mixed", precision="bf16-mixed")
    assert kept["val/cross_entropy"] == pytest.approx(full["val/cross_entropy"], rel=0.01)
    changed = {k for k, v in weights(module).items() if not torch.equal(v, before[k])}
    assert {v.dtype for v in weights(module).values()} == {torch.float32}
    assert changed == {k for k in before if ("lora_" in k if name == "lora" else "routers" in k)}


def test_compiled_layers_train_alike_and_are_compiled_once(
    setup: TinyPhase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from torch._dynamo.testing import CompileCounter

    full = setup.fit(setup.module("lora", replace(OURS, hold_routes=10.0)), tmp_path / "full")
    counter, compile_it = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_it(*args, backend=counter, **options))
    torch._dynamo.reset()
    again = TinyPhase(setup.directory)
    kept = again.fit(again.module("lora", replace(OURS, hold_routes=10.0)), tmp_path / "compiled", compile=True)
    assert kept["val/score"] == pytest.approx(full["val/score"], rel=1e-5)
    # With LoRA and gradient, without gradient, without LoRA, perhaps without a mask; not for each of four layers.
    assert 2 <= counter.frame_count <= 6
    assert not any("compiled_forward" in vars(layer) for layer in again.model.lm.model.layers)


@pytest.mark.parametrize("other", ["objective=soft", "one_phase=true"])
def test_routes_are_held_only_after_a_phase_1_of_the_same_kind(other: str):
    with pytest.raises(ValueError, match=r"method\.hold_routes=1\.0 holds routes of a phase 1"):
        composed("method.hold_routes=1.0", f"method.{other}")
    held = [
        composed(*each)[1].training_objective("lora").hold_routes
        for each in ([f"method.{other}"], ["method.hold_routes=0"], [])
    ]
    assert held == [0, 0, 10]


def test_target_skip_moves_the_hard_rate_towards_the_target(setup: TinyPhase, tmp_path: Path):
    objective = replace(OURS, gate="soft", multiplier=0.0, target_skip=0.5, dual_rate=5.0)
    start_routers(PromptSet(setup.model, setup.data, setup.data.val[:4], 4), [], skip_rate=0.0, margin=0.01)
    module = setup.module("router", objective, learning_rate=0.02)
    kept = setup.fit(module, tmp_path)
    assert kept["val/skip_rate"] > 0.2


def test_router_loss_adds_regulariser_and_penalty():
    loss = router_loss(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0), lam=0.01, alpha=0.1)
    assert loss.item() == pytest.approx(2.0 + 0.03 + 0.5)


def test_lora_loss_has_no_regulariser():
    assert lora_loss(torch.tensor(2.0), torch.tensor(6.0), beta=0.05).item() == pytest.approx(2.3)


def test_distillation_losses_are_divergences_from_the_teacher():
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0, 1.0], [1.0, 3.0]])
    p, q = teacher.softmax(-1), student.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(distillation_losses(student, teacher), by_hand)
    assert distillation_losses(teacher, teacher).tolist() == [0, 0]


def test_too_little_skipping_raises_the_multiplier_and_too_much_lowers_it():
    assert dual_step(0.2, skip_rate=0.10, target=0.15, rate=2.0) == pytest.approx(0.3)
    assert dual_step(0.2, skip_rate=0.50, target=0.15, rate=2.0) == pytest.approx(-0.5)
    assert dual_step(0.2, skip_rate=0.15, target=0.15, rate=2.0) == pytest.approx(0.2)


def test_selection_score_punishes_only_the_distance_beyond_the_tolerance():
    assert selection_score(1.5, 0.9, target=None, tolerance=0.01, weight=100) == 1.5
    assert selection_score(1.5, 0.155, target=0.15, tolerance=0.01, weight=100) == 1.5
    assert selection_score(1.5, 0.18, target=0.15, tolerance=0.01, weight=100) == pytest.approx(1.5 + 2.0)
    assert selection_score(1.5, 0.12, target=0.15, tolerance=0.01, weight=100) == pytest.approx(1.5 + 2.0)
