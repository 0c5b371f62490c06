"""Both phases on a tiny model: what is trained, and by which loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firstlab.methods.objective import RoutingObjective
from firstlab.training.calibration import start_routers
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
