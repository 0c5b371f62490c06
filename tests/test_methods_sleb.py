"""Greedy elimination on known losses."""

from __future__ import annotations

import pytest

from fake_prompts import FakePrompts, skipped
from firstlab.methods.sleb import SLEB, greedy_order

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


def test_more_than_may_be_skipped():
    with pytest.raises(ValueError, match="cannot skip 5 of 6 layers.*lower method.target_skip"):
        SLEB(0.8).routes(FakePrompts(6))
