"""The most frequent route of trained routers."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlab.methods.static_first import StaticFirst, most_frequent
from support.fake_prompts import FakePrompts


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=30))
def test_no_route_is_more_frequent(rows: list[list[bool]]):
    counts = Counter(tuple(row) for row in rows)
    found = tuple(most_frequent(torch.tensor(rows)).tolist())
    assert counts[found] == max(counts.values())


def test_a_tie_goes_to_the_route_that_agrees_best_with_all():
    rows = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]).bool()
    assert most_frequent(rows).tolist() == [False, True, True, True]


def test_only_as_many_prompts_vote_as_asked_for():
    choices = torch.tensor([[1, 0], [0, 1], [0, 1]]).bool()
    prompts = FakePrompts(2, choices=choices)
    assert StaticFirst(0.5, vote_prompts=1).routes(prompts).tolist() == [True, False]
    assert StaticFirst(0.5, vote_prompts=3).routes(prompts).tolist() == [False, True]


def test_settings():
    assert StaticFirst(0.25).label == "static_first-skip0.25" and StaticFirst.trains_routers
    with pytest.raises(ValueError, match="method.vote_prompts=0 must be at least 1"):
        StaticFirst(0.25, vote_prompts=0)
    with pytest.raises(ValueError, match="method.one_phase=true trains the routers after static_first"):
        StaticFirst(0.25, one_phase=True)
