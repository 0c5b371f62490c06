"""A few steps of LoRA under a set of layers: as phase 2 trains them, and gone afterwards."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from firstlab.build import build_data, load_model
from firstlab.model import LoraSettings, PrunedRoutes
from firstlab.training.calibration import Batch, losses_under_routes
from firstlab.training.modules import LoRACompensationModule, OptimizerSettings, RoutingObjective
from firstlab.training.prompt_set import PromptSet
from firstlab.training.repair import LoraPhase, repaired
from tiny_run import composed, overrides

PHASE = LoraPhase(LoraSettings(dropout=0.0), 1e-2, 0.01, 0.2, 1.0, batch_size=4, seed=3)
STEPS = 5
ROUTES = torch.tensor([True, False, True, True])


@pytest.fixture
def prompts(tiny_model_dir: Path, tmp_path: Path) -> PromptSet:
    config, _ = composed(*overrides(tiny_model_dir, tmp_path, "data=mini_ende"))
    data = build_data(config)
    data.setup("fit")
    return PromptSet(load_model(config, tiny_model_dir), data, data.train[:8], 4, phase=PHASE)


def batches_of_others(prompts: PromptSet, count: int) -> list[Batch]:
    """The training prompts behind the measured ones, from the front again when they run out."""
    others = prompts.of(prompts.data.train[len(prompts) :]).batches
    assert all(len(batch["input_ids"]) == PHASE.batch_size for batch in others)
    return list(islice(cycle(others), count))


@pytest.mark.parametrize("routes", [ROUTES, PrunedRoutes(ROUTES)])
@pytest.mark.parametrize("steps", [STEPS, 12])
def test_the_loss_is_that_after_so_many_steps_of_phase_2(prompts: PromptSet, routes: Tensor | PrunedRoutes, steps: int):
    found = prompts.repaired_loss(routes, steps)
    assert found < prompts.loss(routes) - 0.01
    model = prompts.model
    torch.manual_seed(PHASE.seed)
    model.add_lora(PHASE.lora)
    optimizer = OptimizerSettings(PHASE.learning_rate, PHASE.weight_decay, PHASE.warmup_fraction, steps)
    objective = RoutingObjective(objective="decode_consistent")
    module = LoRACompensationModule(model, objective, optimizer, 0, routes, routes)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, gradient_clip_val=PHASE.gradient_clip, **quiet)
    trainer.fit(module, DataLoader(batches_of_others(prompts, steps), batch_size=None))  # type: ignore[arg-type]
    model.eval()
    sums, counts = losses_under_routes(model, prompts.batches, routes)
    assert found == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-5)


def test_the_model_is_left_as_it_was(prompts: PromptSet):
    model = prompts.model
    model.freeze_all_but("routers")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    location, state = model.config._name_or_path, torch.random.get_rng_state()
    first = prompts.repaired_loss(ROUTES, STEPS)
    assert prompts.repaired_loss(ROUTES, STEPS) == first  # the same every time
    with (
        pytest.raises(ZeroDivisionError),
        repaired(model, batches_of_others(prompts, 1), 1, ROUTES, replace(PHASE, gradient_clip=None)),
    ):
        assert model.has_lora
        _ = 1 / 0
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.has_lora and model.training and model.config._name_or_path == location
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    model.add_lora()


def test_without_other_prompts_the_measured_ones_are_trained_on(prompts: PromptSet):
    everything = prompts.of(prompts.data.train)
    assert everything.repaired_loss(ROUTES, 2) < everything.loss(ROUTES)


def test_where_no_phase_is_known(prompts: PromptSet):
    prompts.phase = None
    with pytest.raises(ValueError, match="where a run is trained"):
        prompts.repaired_loss(ROUTES, STEPS)
