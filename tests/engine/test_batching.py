"""Requests that come, end and are cancelled at any time get the tokens that each gets alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.engine.batching import ContinuousBatch, Request
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.graph_step import GraphStep
from firstlab.engine.sampling import Sampling
from firstlab.model.routes import EarlyExit, PrunedRoutes, StepRoutes
from support.models import LAYERS, routed
from support.tape import Tape

RULES: list[Any] = [
    None,
    torch.ones(LAYERS, dtype=torch.bool),
    torch.tensor([True, False, True, True, False, True]),
    torch.tensor([True, True, False, False, False, True]),
    PrunedRoutes(torch.tensor([True, False, True, True, True, False])),
    StepRoutes(torch.tensor([[step < last for last in (9, 2, 9, 4, 1, 9)] for step in range(5)])),
    EarlyExit(0.3),
]


@dataclass(frozen=True)
class Asked:
    """What a client asks for."""

    prompt: tuple[int, ...]
    limit: int
    rule: int
    skip_rate: float | None
    seed: int | None
    ends: tuple[int, ...]

    @property
    def options(self) -> dict[str, Any]:
        return {
            "routes": None if self.skip_rate is not None else RULES[self.rule],
            "skip_rate": self.skip_rate,
            "sampling": None if self.seed is None else Sampling(temperature=0.9, top_k=20, seed=self.seed),
            "eos": self.ends,
        }


ASKED = st.builds(
    Asked,
    st.lists(st.integers(3, 96), min_size=1, max_size=10).map(tuple),
    st.integers(1, 9),
    st.integers(0, len(RULES) - 1),
    st.none() | st.sampled_from([0.0, 0.2, 0.45]),
    st.none() | st.integers(0, 5),
    st.sampled_from([(), (2,), tuple(range(2, 97, 7))]),
)


@cache
def engine(batch_size: int, patience: int, recording: bool, lookahead: int = 0, reserve: int = 0) -> DecodeEngine:
    made = DecodeEngine(routed(), 24, batch_size, "graphs" if recording else "eager", lookahead, patience, reserve)
    if recording:
        assert isinstance(made.step, GraphStep)
        made.step._graphs = Tape()
    return made


@cache
def alone(asked: Asked) -> list[int]:
    return engine(1, 0, False).generate([asked.prompt], asked.limit, **asked.options).tokens[0]


def finish(batch: ContinuousBatch) -> list[Request]:
    ended = []
    while batch.busy:
        ended += batch.advance().ended
    return ended


def one_layer(count: int) -> list[torch.Tensor]:
    return [torch.arange(LAYERS) == layer for layer in range(count)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(ASKED, st.integers(0, 4), st.none() | st.integers(0, 6)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([(False, 0), (False, 2, 3), (True, 1)]),
)
def test_tokens_do_not_depend_on_who_else_is_there(arrivals, batch_size, patience, way) -> None:
    """Every request comes some turns behind the one before it; some clients hang up a few turns later."""
    decoder = engine(batch_size, patience, *way)
    batch, streamed, ended = decoder.batch(), {}, []
    requests: list[tuple[Asked, Request, int | None]] = []

    def turn() -> None:
        progress = batch.advance()
        for request, token in progress.tokens.items():
            streamed.setdefault(request, []).append(token)
        ended.extend(progress.ended)
        for place, (asked, request, patience_left) in enumerate(requests):
            if patience_left == 0 and not request.cancelled and request not in ended:
                batch.cancel(request)
            requests[place] = (asked, request, None if patience_left is None else patience_left - 1)

    for asked, pause, hangs_up in arrivals:
        for _ in range(pause):
            turn()
        request = decoder.request(asked.prompt, asked.limit, **asked.options)
        requests.append((asked, request, hangs_up))
        batch.add(request)
    while batch.busy:
        turn()
    assert len(ended) == len(set(ended))
    for asked, request, _ in requests:
        if request.cancelled:
            assert request not in ended and request.tokens == alone(asked)[: len(request.tokens)]
        else:
            assert request in ended and request.tokens == streamed[request] == alone(asked)
        assert request.overtaken <= patience


@settings(max_examples=15, deadline=None)
@given(st.lists(ASKED, min_size=2, max_size=8), st.randoms(use_true_random=False), st.sampled_from([0, 3]))
def test_order_of_prompts_and_of_results(asked, random, patience) -> None:
    """`generate` gives results in the order of its prompts, and the same ones whatever that order is."""
    routes = torch.stack([RULES[1 + each.rule % 3] for each in asked])
    order = random.sample(range(len(asked)), len(asked))
    decoder = engine(3, patience, False)
    found = decoder.generate([each.prompt for each in asked], [each.limit for each in asked], routes)
    mixed = decoder.generate([asked[i].prompt for i in order], [asked[i].limit for i in order], routes[order])
    assert mixed.tokens == [found.tokens[i] for i in order]
    assert torch.equal(mixed.routes, found.routes[order])


def joined(patience: int, routes: list[torch.Tensor], limits: list[int]) -> tuple[list[int], DecodeEngine, float]:
    """The order in which prompts with these routes end in a batch of two."""
    decoder = engine(2, patience, False)
    order, union = [], 0.0
    for place, out in decoder.as_completed([[5, 6]] * len(routes), limits, torch.stack(routes), ()):
        order.append(place)
        union = out.union_layers
    return order, decoder, union


def test_prompts_whose_routes_share_layers_decode_together() -> None:
    first, second = (torch.tensor([half] * 3 + [not half] * 3) for half in (True, False))
    # Both places go to the first two; of the two that are prefilled next, the one that fits is taken.
    routes, limits = [first, first, second, first, second, second], [3, 5, 5, 5, 5, 5]
    assert joined(0, routes, limits)[0] == [0, 1, 2, 3, 4, 5]
    [fifo, fits] = (joined(patience, routes, limits) for patience in (0, 2))
    assert fits[0][:3] == [0, 1, 3] and sorted(fits[0]) == list(range(6))
    assert 3 <= fits[2] < fifo[2] <= 6


def test_nobody_is_overtaken_more_than_patience_allows() -> None:
    """Six prompts are prefilled for two places; the first that waits shares no layer with the others."""
    odd, common = torch.arange(LAYERS) == 5, torch.arange(LAYERS) < 2
    for patience in (0, 1, 3):
        decoder = engine(6, patience, False)
        batch = decoder.batch()
        long = [decoder.request([7, 8], 20, common, eos=()) for _ in range(5)]
        for request in long:
            batch.add(request)
        batch.add(decoder.request([7, 8], 2, common, eos=()))
        batch.advance()  # prefill
        waiting = [
            decoder.request([9], 2, odd, eos=()),
            *(decoder.request([9, 9], 2, common, eos=()) for _ in range(5)),
        ]
        for request in waiting:
            batch.add(request)
        order = [waiting.index(request) for request in finish(batch) if request in waiting]
        assert order.index(0) == patience and waiting[0].overtaken == patience


def test_the_union_is_counted_step_by_step() -> None:
    decoder = engine(3, 0, False)
    batch = decoder.batch()
    for route, limit in zip(one_layer(3), (2, 3, 4), strict=True):
        batch.add(decoder.request([5, 6], limit, route, eos=()))
    ended = finish(batch)
    assert (batch.steps, batch.layers_read) == (3, 3 + 2 + 1)
    assert [request.union_layers for request in ended] == [3, 2.5, 2] and batch.union_layers == 2
    out = decoder.generate([[5, 6]] * 3, [2, 3, 4], torch.stack(one_layer(3)), ())
    assert out.union_layers == 2 and decoder.generate([[5, 6]], 1).union_layers == 0
    schedule = StepRoutes(torch.tensor([[True] * 6, [True, True] + [False] * 4]))
    assert decoder.generate([[5, 6]], 3, schedule, ()).union_layers == (6 + 2) / 2


def test_a_place_of_a_cancelled_request_is_taken_at_once() -> None:
    decoder = engine(1, 0, False)
    batch = decoder.batch()
    first, second = (decoder.request([5, token], 20, eos=()) for token in (6, 7))
    batch.add(first)
    batch.add(second)
    for _ in range(4):
        batch.advance()
    assert batch.active == [first] and len(first.tokens) == 4 and second in batch.waiting
    batch.cancel(first)
    batch.advance()
    assert second.tokens and first not in batch.active
    assert finish(batch) == [second] and len(first.tokens) == 4 and batch.steps == 3 + 19
    batch.cancel(second)  # which has ended: nothing happens
    assert not batch.busy and batch.advance() == ({}, [])


def test_what_cannot_be_decoded_is_refused_when_it_is_made() -> None:
    decoder = engine(1, 0, False)
    for given_, message in (
        ({"max_new_tokens": 30}, "raise max_length"),
        ({"max_new_tokens": 2, "skip_rate": 0.9}, r"skip_rate=0\.9 must lie between"),
        ({"max_new_tokens": 2, "skip_rate": 0.1, "routes": RULES[1]}, "drop one"),
        ({"max_new_tokens": 2, "routes": RULES[1][:3]}, "boolean tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.request([5], **given_)
    former = decoder.batch()
    former.add(decoder.request([5], 2))
    decoder.generate([[5]], 2)
    with pytest.raises(ValueError, match="another call of this engine began"):
        former.advance()
    with pytest.raises(ValueError, match="patience=-1"):
        DecodeEngine(routed(), 16, patience=-1)
