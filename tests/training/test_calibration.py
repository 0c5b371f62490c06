"""Routers started from a static set: the wanted routes, margins and rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from firstlab.config.build import load_model
from firstlab.training.calibration import losses_under_routes, start_routers
from support.tiny_phase import TinyPhase
from support.tiny_run import composed, overrides


@pytest.fixture
def setup(tiny_model_dir: Path) -> TinyPhase:
    return TinyPhase(tiny_model_dir)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_a_calibrated_start_lies_around_the_threshold(tiny_model_dir: Path, tmp_path: Path, threshold: float):
    config, _ = composed(*overrides(tiny_model_dir, tmp_path, f"router.threshold={threshold}"))
    setup = TinyPhase(tiny_model_dir)
    setup.model = load_model(config, tiny_model_dir)
    batches = calibration_batches(setup)
    for order, rate in (([], 0.0), ([1], 0.25), ([1, 3], 0.375)):
        start_routers(setup.model, batches, order, rate, margin=0.2)
        routes = torch.cat([setup.model.route(b["input_ids"], b["prompt_mask"]) for b in batches])
        # Of a layer that a share of the prompts skips, two prompts may cross the threshold together.
        assert 1 - routes.float().mean().item() == pytest.approx(rate, abs=1 / routes.numel())
        assert len(routes.unique(dim=0)) == (1 if rate < 0.3 else 2)


def calibration_batches(setup: TinyPhase) -> list[dict[str, torch.Tensor]]:
    return [{k: v for k, v in batch.items() if k != "index"} for batch in setup.data.val_dataloader()]


def test_a_calibrated_start_gives_the_wanted_routes_and_margins(setup: TinyPhase):
    batches = calibration_batches(setup)
    start_routers(setup.model, batches, order=[1, 3], skip_rate=0.5, margin=0.2)
    routes = torch.tensor([True, False, True, False])
    for batch in batches:
        rho = setup.model.prompt_rho(batch["input_ids"], batch["prompt_mask"])
        assert torch.equal(setup.model.routers.decide(rho), routes.expand_as(rho))
        torch.testing.assert_close(rho.mean(0), torch.where(routes, 0.7, 0.3), atol=0.08, rtol=0)


def test_a_rate_between_two_layers_is_met_by_skipping_one_for_some_prompts(setup: TinyPhase):
    batches = calibration_batches(setup)
    start_routers(setup.model, batches, order=[1, 3], skip_rate=0.375, margin=0.2)
    routes = torch.cat([setup.model.route(b["input_ids"], b["prompt_mask"]) for b in batches])
    assert (~routes).float().mean(0).tolist() == [0, 1, 0, 0.5]
    assert 1 - routes.float().mean() == 0.375


def test_calibration_loss_is_the_loss_of_the_routed_model(setup: TinyPhase):
    batch = {k: v for k, v in next(iter(setup.data.val_dataloader())).items() if k != "index"}
    routes = torch.tensor([True, False, True, True])
    labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
    out = setup.model(**{**batch, "labels": labels}, objective="decode_consistent", routes=routes)
    sums, counts = losses_under_routes(setup.model, [batch], routes)
    assert float(sums.sum() / counts.sum()) == pytest.approx(out.loss.item(), rel=1e-5)
    sums, _ = losses_under_routes(setup.model, [batch], ~routes)
    assert float(sums.sum() / counts.sum()) != pytest.approx(out.loss.item(), rel=1e-3)


