"""Greedy elimination on known losses."""

from __future__ import annotations

import pytest
import torch

from fake_prompts import FakePrompts, skipped
from firstlab.methods.sleb import SLEB, greedy_order
from firstlab.model import PrunedRoutes

ALONE = [0.0, 0.5, 0.1, 0.3, 0.2, 0.0]


def loss(text: str, layers: tuple[int, ...]) -> float:
    """Layers 2 and 4 cost much together."""
    return sum(ALONE[layer] for layer in layers) + 5 * ({2, 4} <= set(layers))


def test_each_step_removes_the_layer_that_hurts_least_given_those_removed():
    assert greedy_order(6, 3, FakePrompts(6, loss_of=loss).loss) == [2, 3, 1]


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
