"""Greedy elimination on known losses."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlab.methods.sleb import SLEB, elimination
from firstlab.model.routes import PrunedRoutes
from support.fake_prompts import FakePrompts, skipped
from support.tiny_run import composed

ALONE = [0.0, 0.5, 0.1, 0.3, 0.2, 0.0]


def loss(text: str, layers: tuple[int, ...]) -> float:
    """Layers 2 and 4 cost much together."""
    return sum(ALONE[layer] for layer in layers) + 5 * ({2, 4} <= set(layers))


def test_each_step_removes_the_layer_that_hurts_least_given_those_removed():
    assert elimination(6, 3, FakePrompts(6, loss_of=loss).mean_losses) == [2, 3, 1]


def test_a_beam_finds_what_greedy_elimination_misses():
    def pairs(layers: tuple[int, ...]) -> float:
        """Alone layer 2 is the least costly, together layers 3 and 4 are."""
        return {(): 0.0, (2,): 0.1, (3,): 0.2, (4,): 0.3}.get(layers, 0.1 if layers == (3, 4) else 1.0 + len(layers))

    def losses_of(routes: torch.Tensor) -> list[float]:
        return [pairs(tuple(skipped(each))) for each in routes]

    assert sorted(elimination(6, 2, losses_of)) != [3, 4]
    assert sorted(elimination(6, 2, losses_of, width=2)) == [3, 4]
    assert elimination(6, 3, losses_of, first=[3, 4])[:2] == [3, 4]


@given(st.integers(3, 7), st.data())
def test_a_beam_as_wide_as_all_sets_finds_the_best_one(layers: int, data: st.DataObject):
    count = data.draw(st.integers(0, layers - 2))
    sets = [frozenset(c) for k in range(count + 1) for c in combinations(range(1, layers - 1), k)]
    losses = dict(zip(sets, data.draw(st.permutations(range(len(sets)))), strict=True))

    def losses_of(routes: torch.Tensor) -> list[float]:
        return [losses[frozenset(skipped(each))] for each in routes]

    found = elimination(layers, count, losses_of, width=len(sets))
    assert len(set(found)) == count
    assert losses[frozenset(found)] == min(loss for each, loss in losses.items() if len(each) == count)
    greedy = elimination(layers, count, losses_of)
    for end in range(1, count + 1):
        options = [frozenset([*greedy[: end - 1], i]) for i in range(1, layers - 1) if i not in greedy[: end - 1]]
        assert losses[frozenset(greedy[:end])] == min(losses[each] for each in options)


@pytest.mark.parametrize("method", ["sleb", "first"])
def test_the_width_of_a_search(method: str):
    plain, _ = composed(f"method={method}")
    wide, built = composed(f"method={method}", "method.search_width=4")
    assert plain.identity()["method"]["search_width"] == 1 and wide.identity()["method"]["search_width"] == 4
    assert built.search_width == 4 and plain.hash() != wide.hash()
    for width, allowed in ((0, "at least 1"), (99999, "at most 64")):
        with pytest.raises(ValueError, match=f"method.search_width={width} must be {allowed}"):
            composed(f"method={method}", f"method.search_width={width}")


def test_only_the_static_start_is_searched():
    with pytest.raises(ValueError, match="method.search_width=2 searches the static set, and method.start=dense"):
        composed("method=first", "method.start=dense", "method.search_width=2")


def test_ends_are_protected_unless_asked_otherwise():
    assert skipped(SLEB(0.33).routes(FakePrompts(6, loss_of=loss))) == [2, 3]
    assert skipped(SLEB(0.33, 0, 0).routes(FakePrompts(6, loss_of=loss))) == [0, 5]


def test_only_calibration_prompts_are_measured():
    seen = set()

    def noting(text: str, layers: tuple[int, ...]) -> float:
        seen.add(text)
        return loss(text, layers)

    SLEB(0.2, calibration_prompts=2).routes(FakePrompts(6, loss_of=noting))
    assert seen == {"a", "b"}


def test_each_step_is_measured_as_the_layers_are_skipped_later():
    class Told(FakePrompts):
        """In decode layer 2 hurts least, in prefill layer 4."""

        def take(self, count):
            return self

        def loss(self, routes):
            pruned = isinstance(routes, PrunedRoutes)
            return float(routes.ran[4] if pruned else routes[2])

    assert skipped(SLEB(0.17).routes(Told(6))) == [2]
    found = SLEB(0.17, skip_prefill=True).routes(Told(6))
    assert isinstance(found, PrunedRoutes) and torch.equal(found.ran, torch.tensor([1, 1, 1, 1, 0, 1]).bool())


def test_more_than_may_be_skipped():
    with pytest.raises(ValueError, match="cannot skip 5 of 6 layers.*lower method.target_skip"):
        SLEB(0.8).routes(FakePrompts(6))
