"""Codebooks on known losses, routers fitted to them on a tiny model, and the threshold for a rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlab.config.build import build_data, load_model
from firstlab.methods.sleb import elimination
from firstlab.run.experiment import Experiment
from firstlab.training.codebook import (
    allocate,
    cluster,
    find_codebook,
    fit_to_routes,
    nearest,
    pooled_states,
    threshold_at,
)
from firstlab.training.prompt_set import PromptSet
from support.fake_prompts import FakePrompts, skipped
from support.tiny_run import composed, overrides

# Prompts "a..." do without the layers 1 and 2, prompts "b..." without 3 and 4.
SPARE = {"a": {1, 2}, "b": {3, 4}}


def loss_of(text: str, layers: tuple[int, ...]) -> float:
    return float(len(set(layers) - SPARE[text[0]]))


KINDS = torch.tensor([0, 1, 1, 0, 1])
TEXTS = ("a1", "b1", "b2", "a2", "b3")


def test_each_kind_of_prompt_gets_the_route_that_costs_it_nothing():
    prompts = FakePrompts(6, TEXTS, loss_of)
    routes = find_codebook(prompts, KINDS, prompts, KINDS, 2 / 6)
    assert [skipped(route) for route in routes] == [[1, 2], [3, 4]]
    assert prompts.losses(routes[KINDS]).tolist() == [0.0] * 5


def test_one_kind_has_the_greedy_static_set():
    prompts = FakePrompts(6, ("a1", "a2", "b1"), lambda text, out: loss_of(text, out) + 0.01 * sum(out))
    alike = torch.zeros(3, dtype=torch.long)
    [route] = find_codebook(prompts, alike, prompts, alike, 3 / 6)
    assert skipped(route) == sorted(elimination(6, 3, prompts.mean_losses))


def test_layers_are_skipped_where_other_prompts_say_that_it_costs_least():
    def honest(text: str, out: tuple[int, ...]) -> float:
        return len(out) * (0.1 if text[0] == "a" else 1.0)

    prompts, kinds = FakePrompts(10, ("a", "b"), lambda text, out: 0.0), torch.tensor([0, 1])
    routes = find_codebook(prompts, kinds, FakePrompts(10, ("a", "b"), honest), kinds, 0.2)
    assert (~routes).sum(1).tolist() == [4, 0]  # at most twice the mean


@given(
    st.lists(st.lists(st.floats(0, 9), min_size=4, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=3, max_size=3),
    st.floats(0, 3),
)
def test_an_allocation_meets_the_budget(rises: list[list[float]], sizes: list[int], budget: float):
    curves = torch.tensor([[0.0, *rise] for rise in rises]).cumsum(1)
    shares = torch.tensor(sizes[: len(rises)], dtype=torch.float) / sum(sizes[: len(rises)])
    counts = allocate(curves, shares, budget)
    assert all(0 <= count <= 4 for count in counts)
    spent = sum(count * float(share) for count, share in zip(counts, shares, strict=True))
    assert spent <= budget + float(shares.min()) / 2 + 1e-6
    # No cluster has room for another layer within the budget.
    assert spent >= budget - float(shares.max()) - 1e-6


@given(st.lists(st.lists(st.floats(0, 9), min_size=4, max_size=4), min_size=2, max_size=2), st.integers(0, 8))
def test_with_rising_costs_and_equal_shares_the_allocation_is_the_best_one(rises: list[list[float]], budget: int):
    curves = torch.tensor([[0.0, *sorted(rise)] for rise in rises], dtype=torch.float64).cumsum(1)
    first, second = allocate(curves, torch.tensor([0.5, 0.5]), budget / 2)
    assert first + second == budget
    best = min(curves[0, k] + curves[1, budget - k] for k in range(5) if 0 <= budget - k <= 4)
    assert float(curves[0, first] + curves[1, second]) == pytest.approx(float(best), abs=1e-5)


def test_an_order_that_only_pays_off_later_is_seen():
    # The first layer of the second cluster costs more than one of the first, three together cost nothing.
    curves = torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.0, 0.2, 0.2, 0.0]])
    assert allocate(curves, torch.tensor([0.5, 0.5]), 1.5) == [0, 3]


def test_every_centre_has_points_of_its_own():
    points = torch.tensor([[0.0], [0.0], [9.0]])
    centres = cluster(points, 3)
    assert sorted(centres.flatten().tolist()) == [0.0, 9.0]
    found = nearest(points, centres)
    assert found[0] == found[1] != found[2]


def test_more_centres_than_prompts_are_refused():
    with pytest.raises(ValueError, match=r"method\.codebook_size=3 is more than the 2 training prompts"):
        cluster(torch.zeros(2, 4), 3)


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
    accuracy = fit_to_routes(prompts, wanted, margin=0.1, trained=18)
    assert torch.equal(prompts.routed()[:18], wanted[:18])
    held_out = (prompts.routed() == wanted)[18:].float().mean(0)
    torch.testing.assert_close(accuracy, held_out)


def test_pooled_states_do_not_depend_on_padding(tiny_model_dir: Path, tmp_path: Path):
    config, _ = composed(*overrides(tiny_model_dir, tmp_path, "data=mini_mixture"))
    data, model = build_data(config), load_model(config, tiny_model_dir)
    together = pooled_states(PromptSet(model, data, data.train[:5], 5))
    alone = torch.cat([pooled_states(PromptSet(model, data, [e], 1)) for e in data.train[:5]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_a_run_from_a_codebook_to_the_calibrated_rate(tiny_model_dir: Path, tmp_path: Path):
    extra = ("data=mini_mixture", "method.start=codebook", "method.codebook_size=2", "method.fit_prompts=8")
    small = (*extra, "method.calibrate_rate=true", "method.target_skip=0.25", "phases=[router,evaluate]")
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *small)))
    variant = run.run()["variants"]["router"]
    assert set(variant["skip"]["by_part"]) == set(run.data.task.parts)
    assert {"mean", "mini_ende/bleu", "mini_qa/f1", "mini_summarization/rougeL"} <= set(variant["metrics"])
    assert variant["primary_metric"] == "mean"
    assert run.model.routers.settings.threshold != 0.5
    assert (~run.prompts(run.data.val).routed()).float().mean() == pytest.approx(0.25)


@pytest.mark.parametrize("option", ["start=codebook", "calibrate_rate=true"])
def test_what_needs_a_rate_says_so(option: str):
    with pytest.raises(ValueError, match=r"needs method\.target_skip"):
        composed("method.target_skip=null", "method.start=dense", f"method.{option}")


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"method\.codebook_size=0 must be at least 1"):
        composed("method.codebook_size=0")
