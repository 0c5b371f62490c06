"""Routers started from a static set: the wanted routes, margins and rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from firstlab.config.build import load_model
from firstlab.methods.first import First
from firstlab.training.calibration import start_routers
from firstlab.training.prompt_set import PromptSet, losses_under_routes
from firstlab.training.router_start import start_phase_1
from support.tiny_phase import TinyPhase
from support.tiny_run import composed, overrides


@pytest.fixture
def setup(tiny_model_dir: Path) -> TinyPhase:
    return TinyPhase(tiny_model_dir)


def prompts_of(setup: TinyPhase, progress_bar: bool = False) -> PromptSet:
    return PromptSet(setup.model, setup.data, setup.data.val, 4, progress_bar=progress_bar)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_a_calibrated_start_lies_around_the_threshold(tiny_model_dir: Path, setup: TinyPhase, threshold: float):
    setup.model = load_model(
        composed(*overrides(tiny_model_dir, tiny_model_dir, f"router.threshold={threshold}"))[0], tiny_model_dir
    )
    prompts = prompts_of(setup)
    for order, rate in (([], 0.0), ([1], 0.25), ([1, 3], 0.375)):
        start_routers(prompts, order, skip_rate=rate, margin=0.2)
        routes = prompts.routed()
        # Of a layer that a share of the prompts skips, two prompts may cross the threshold together.
        assert 1 - routes.float().mean().item() == pytest.approx(rate, abs=1 / routes.numel())
        assert len(routes.unique(dim=0)) == (1 if rate < 0.3 else 2)


def test_a_calibrated_start_gives_the_wanted_routes_and_margins(setup: TinyPhase):
    prompts = prompts_of(setup)
    start_routers(prompts, [1, 3], skip_rate=0.5, margin=0.2)
    routes = torch.tensor([True, False, True, False])
    for batch in prompts.batches:
        rho = setup.model.prompt_rho(batch["input_ids"], batch["prompt_mask"])
        assert torch.equal(setup.model.routers.decide(rho), routes.expand_as(rho))
        torch.testing.assert_close(rho.mean(0), torch.where(routes, 0.7, 0.3), atol=0.08, rtol=0)


def test_a_rate_between_two_layers_is_met_by_skipping_one_for_some_prompts(setup: TinyPhase):
    prompts = prompts_of(setup)
    start_routers(prompts, [1, 3], skip_rate=0.375, margin=0.2)
    routes = prompts.routed()
    assert (~routes).float().mean(0).tolist() == [0, 1, 0, 0.5]
    assert 1 - routes.float().mean() == 0.375


def test_calibration_loss_is_the_loss_of_the_routed_model(setup: TinyPhase):
    batch = {k: v for k, v in prompts_of(setup).batches[0].items() if k != "index"}
    routes = torch.tensor([True, False, True, True])
    labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
    out = setup.model(**{**batch, "labels": labels}, objective="decode_consistent", routes=routes)
    sums, counts = losses_under_routes(setup.model, [batch], routes)
    assert float(sums.sum() / counts.sum()) == pytest.approx(out.loss.item(), rel=1e-5)
    sums, _ = losses_under_routes(setup.model, [batch], ~routes)
    assert float(sums.sum() / counts.sum()) != pytest.approx(out.loss.item(), rel=1e-3)


@pytest.mark.parametrize("shown", [True, False])
def test_calibration_says_how_many_prompts_there_are_and_shows_progress(
    setup: TinyPhase, tmp_path: Path, shown: bool, capsys: pytest.CaptureFixture[str]
):
    method = First(target_skip=0.375, start="static", calibration_prompts=128).router_start()
    start_phase_1(tmp_path, method, prompts_of(setup, progress_bar=shown))
    printed = capsys.readouterr()
    assert printed.out == "calibrating the routers' start on 8 training prompts\n"
    for title in ("search layers to skip", "fit routers", "meet the skip rate"):
        assert (title in printed.err) is shown


def test_weights_that_are_no_numbers_stop_the_calibration(setup: TinyPhase, tmp_path: Path):
    with torch.no_grad():
        setup.model.backbone.layers[2].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"8 of 8 losses of prompts are infinite or not a number.*model\.dtype"):
        start_phase_1(tmp_path, First(target_skip=0.25, start="static").router_start(), prompts_of(setup))
    with pytest.raises(ValueError, match="hidden states are infinite or not a number"):
        start_routers(prompts_of(setup), [1], skip_rate=0.25, margin=0.2)
    assert list(tmp_path.iterdir()) == []
