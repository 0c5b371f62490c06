"""Unified layer skipping: the official rule with its published examples, and the evenly spread one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlab.methods.unified_skip import UnifiedSkip
from support.fake_prompts import FakePrompts, skipped


@pytest.mark.parametrize(
    ("speedup", "running"),
    [
        (2, [*range(0, 29, 2), 31]),
        (5, [0, 6, 12, 18, 24, 31]),
        (1.18, [*range(26), 31]),
        (1.33, [*range(23), 31]),
    ],
)
def test_official_rule_on_32_layers(speedup: float, running: list[int]):
    routes = UnifiedSkip(1 - 1 / speedup).routes(FakePrompts(32))
    assert routes.nonzero()[:, 0].tolist() == running


@given(layers=st.integers(4, 80), rate=st.floats(0.01, 0.6))
def test_official_rule_runs_n_layers_ends_included(layers: int, rate: float):
    """Against the rule's own loop, written out."""
    count = int(layers / (1 / (1 - rate)) + 1e-9)
    if count < 2:
        return
    interval, expected = int(layers / (count - 1)), {0, layers - 1}
    for index in range(1, layers - 1):
        if len(expected) < count and index % interval == 0:
            expected.add(index)
    routes = UnifiedSkip(rate).routes(FakePrompts(layers))
    assert set(routes.nonzero()[:, 0].tolist()) == expected
    assert int(routes.sum()) == count


def test_whole_numbers_of_layers_are_not_lost_to_rounding():
    for layers in range(4, 200, 4):
        assert len(skipped(UnifiedSkip(0.25).routes(FakePrompts(layers)))) == layers // 4


@given(layers=st.integers(6, 80), rate=st.floats(0.01, 0.6))
def test_even_rule_spreads_the_skipped_layers(layers: int, rate: float):
    found = skipped(UnifiedSkip(rate, rule="even").routes(FakePrompts(layers)))
    assert len(found) == round(rate * layers)
    assert not {0, layers - 1} & set(found)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    below, above = (found[0] - 1, layers - 2 - found[-1]) if found else (0, 0)
    assert abs(below - above) <= 1


def test_even_example():
    assert skipped(UnifiedSkip(0.25, rule="even").routes(FakePrompts(16))) == [2, 6, 9, 13]


def test_the_rounding_is_stated():
    assert UnifiedSkip(0.15).rounding(16) == "3 of 16 layers = 18.8 % for 15 %"
    assert UnifiedSkip(0.15, rule="even").rounding(16) == "2 of 16 layers = 12.5 % for 15 %"


def test_errors():
    with pytest.raises(ValueError, match="method.rule='odd': choose one of official, even"):
        UnifiedSkip(rule="odd")
    with pytest.raises(ValueError, match="cannot skip 4 of 5 layers"):
        UnifiedSkip(0.8).routes(FakePrompts(5))
