"""Codebooks on known losses, routers fitted to them on a tiny model, and the threshold for a rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fake_prompts import FakePrompts, skipped
from firstlab.build import build_data, load_model
from firstlab.experiment import Experiment
from firstlab.methods.sleb import greedy_order
from firstlab.training.codebook import best_of, cluster, find_codebook, fit_to_routes, threshold_at
from firstlab.training.prompt_set import PromptSet
from tiny_run import composed, overrides

# Prompts "a..." do without the layers 1 and 2, prompts "b..." without 3 and 4.
SPARE = {"a": {1, 2}, "b": {3, 4}}


def loss_of(text: str, layers: tuple[int, ...]) -> float:
    return float(len(set(layers) - SPARE[text[0]]))


def test_each_kind_of_prompt_gets_the_route_that_costs_it_nothing():
    prompts = FakePrompts(6, ("a1", "b1", "b2", "a2", "b3"), loss_of)
    routes = find_codebook(prompts, 2, 2, rounds=2)
    assert sorted(skipped(route) for route in routes) == [[1, 2], [3, 4]]
    assert prompts.losses(routes[best_of(prompts, routes)]).tolist() == [0.0] * 5


def test_one_route_is_the_greedy_static_set():
    prompts = FakePrompts(6, ("a1", "a2", "b1"), lambda text, out: loss_of(text, out) + 0.01 * sum(out))
    [route] = find_codebook(prompts, 1, 3, rounds=1)
    assert skipped(route) == sorted(greedy_order(6, 3, prompts.loss))


def test_more_clusters_than_kinds_of_points_leave_equal_points_together():
    points = torch.tensor([[0.0], [0.0], [9.0]])
    found = cluster(points, 3)
    assert found[0] == found[1] != found[2]


@given(st.lists(st.floats(0.01, 0.99), min_size=4, max_size=40, unique=True), st.floats(0.05, 0.95))
def test_the_threshold_gives_the_rate_exactly(values: list[float], rate: float):
    rho = torch.tensor(values, dtype=torch.float64)
    threshold = threshold_at(rho[None], rate)
    assert 0 < threshold < 1
    assert int((rho < threshold).sum()) == round(rate * len(values))


def test_routers_learn_routes_that_the_prompt_tells(tiny_model_dir: Path, tmp_path: Path):
    config, _ = composed(*overrides(tiny_model_dir, tmp_path, "data=mini_mixture"))
    data, model = build_data(config), load_model(config, tiny_model_dir)
    prompts = PromptSet(model, data, data.train[:24], 8)
    is_qa = torch.tensor([example.part == "mini_qa" for example in prompts.examples])
    wanted = torch.stack([torch.ones(24).bool(), is_qa, ~is_qa, torch.zeros(24).bool()], dim=1)
    accuracy = fit_to_routes(model, prompts.batches, wanted, 0.1, 18)
    assert torch.equal(prompts.routed()[:18], wanted[:18])
    held_out = (prompts.routed() == wanted)[18:].float().mean(0)
    torch.testing.assert_close(accuracy, held_out)


def test_a_run_from_a_codebook_to_the_calibrated_rate(tiny_model_dir: Path, tmp_path: Path):
    extra = ("data=mini_mixture", "method.start=codebook", "method.codebook_size=2", "method.fit_prompts=8")
    small = (*extra, "method.calibrate_rate=true", "method.target_skip=0.25", "phases=[router,evaluate]")
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *small)))
    variant = run.run()["variants"]["router"]
    assert set(variant["skip"]["by_part"]) == set(run.data.task.parts)
    assert {"mean", "mini_ende/bleu", "mini_qa/f1", "mini_summarization/rougeL"} <= set(variant["metrics"])
    assert variant["primary_metric"] == "mean"
    assert run.model.routers.settings.threshold != 0.5
    assert (~run._prompts(run.data.val).routed()).float().mean() == pytest.approx(0.25)


@pytest.mark.parametrize("option", ["start=codebook", "calibrate_rate=true"])
def test_what_needs_a_rate_says_so(option: str):
    with pytest.raises(ValueError, match=r"needs method\.target_skip"):
        composed("method.target_skip=null", "method.start=dense", f"method.{option}")


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"method\.codebook_size=0 must be at least 1"):
        composed("method.codebook_size=0")
