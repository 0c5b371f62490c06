"""The oracle's search against exhaustive search, on losses that are known for every route."""

from __future__ import annotations

import random
from itertools import combinations

import pytest
import torch

from firstlab.methods.oracle import Oracle
from support.fake_prompts import FakePrompts, skipped


def additive(text: str, layers: tuple[int, ...]) -> float:
    return sum(random.Random(f"{text}{layer}").random() for layer in layers)


def test_where_layers_do_not_interact_the_best_route_of_every_prompt_is_found():
    texts = [f"prompt {i}" for i in range(12)]
    routes = Oracle(0.3, swap_rounds=0).routes(FakePrompts(10, texts, additive))
    for text, route in zip(texts, routes, strict=True):
        best = min(combinations(range(1, 9), 3), key=lambda each: additive(text, each))
        assert tuple(skipped(route)) == best
    assert len(routes.unique(dim=0)) > 5


def misleading(text: str, layers: tuple[int, ...]) -> float:
    """Layer 1 looks best alone, layers 2 and 3 are best together, for one of the two prompts."""
    if text == "plain" or len(layers) < 2:
        return sum(layers) / 10
    return 0.0 if layers == (2, 3) else 1.0


def test_swaps_mend_what_greedy_elimination_missed():
    prompts = FakePrompts(6, ["plain", "mislead"], misleading)
    assert [skipped(route) for route in Oracle(0.33, swap_rounds=0).routes(prompts)] == [[1, 2], [1, 2]]
    assert [skipped(route) for route in Oracle(0.33, swap_rounds=1).routes(prompts)] == [[1, 2], [2, 3]]


def test_more_rounds_never_raise_a_loss():
    def entangled(text: str, layers: tuple[int, ...]) -> float:
        return random.Random(f"{text}{layers}").random()

    prompts = FakePrompts(8, [f"prompt {i}" for i in range(20)], entangled)
    losses = [prompts.losses(Oracle(0.4, swap_rounds=rounds).routes(prompts)) for rounds in range(4)]
    for before, after in zip(losses, losses[1:], strict=False):
        assert (after <= before).all()
    assert (losses[-1] < losses[0]).any()


def test_prompts_do_not_influence_one_another():
    texts = [f"prompt {i}" for i in range(6)]
    together = Oracle(0.3).routes(FakePrompts(10, texts, additive))
    for text, route in zip(texts, together, strict=True):
        assert torch.equal(Oracle(0.3).routes(FakePrompts(10, [text], additive))[0], route)


def test_a_rate_that_rounds_to_no_layer_skips_none():
    assert Oracle(0.01).routes(FakePrompts(10)).all()


def test_where_every_layer_that_may_be_skipped_is_there_is_nothing_to_exchange():
    routes = Oracle(0.6).routes(FakePrompts(5, ["a", "b"], lambda text, layers: float(len(layers))))
    assert [skipped(route) for route in routes] == [[1, 2, 3], [1, 2, 3]]


def test_negative_rounds_are_refused():
    with pytest.raises(ValueError, match="method.swap_rounds=-1 must be at least 0"):
        Oracle(swap_rounds=-1)


@pytest.mark.parametrize("worst", [torch.nan, torch.inf])
def test_a_prompt_whose_loss_is_no_number_still_gets_a_route(worst: float):
    def overflowing(text: str, layers: tuple[int, ...]) -> float:
        return worst if text == "long" else additive(text, layers)

    routes = Oracle(0.3).routes(FakePrompts(10, ["short", "long"], overflowing))
    assert (~routes).sum(1).tolist() == [3, 3]
    assert torch.equal(routes[0], Oracle(0.3).routes(FakePrompts(10, ["short"], additive))[0])
