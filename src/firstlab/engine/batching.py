"""Continuous batching: prompts come and go while others decode, each with its own routes, sampling, limit and stops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from firstlab.engine.llama_step import LlamaStep
from firstlab.engine.sampling import most_likely
from firstlab.model.routes import EarlyExit, FixedRoutes, RoutersDecide, Routes

#: Next tokens [B] of logits [B, V].
Chooser = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Request:
    """A prompt, what is asked for, and what has come of it; `DecodeEngine.request` makes it."""

    prompt: Sequence[int]
    max_new_tokens: int
    ends: frozenset[int]  # tokens that end it
    rule: Routes | None = None  # of this prompt; None: the routers decide
    choose: Chooser = most_likely  # requests that share one draw from one generator
    draws_alone: bool = True  # whether a draw in vain disturbs no other request
    index: int = 0  # the place among the prompts of one call

    tokens: list[int] = field(default_factory=list)  # the response until now
    route: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))  # [L], of the first decode step
    length: int = 0  # tokens whose keys and values are there
    depths: list[int] = field(default_factory=list)  # layers that each decode step ran under `EarlyExit`
    kv: dict[int, Tensor] = field(default_factory=dict)  # layer to [2, kv heads, length, head dim], until it decodes
    layers: int = 0  # those of the next decode step, as bits
    overtaken: int = 0  # by how many that were prefilled later
    cancelled: bool = False
    union_layers: float = 0  # of its batch, when it ended

    @property
    def ended(self) -> bool:
        """Whether the response is complete."""
        return bool(self.tokens) and (len(self.tokens) >= self.max_new_tokens or self.tokens[-1] in self.ends)

    @cached_property
    def drops(self) -> dict[int, list[int]]:
        """Decode step to the layers that the step before still ran."""
        return {} if self.rule is None else self.rule.drops()

    @property
    def exit_rule(self) -> EarlyExit | None:
        """The rule by which its tokens leave early."""
        return None if self.rule is None else self.rule.exit_rule

    def prefilled(self, token: int, route: Tensor, kv: dict[int, Tensor]) -> None:
        """Take in the first token, the route [L] and the keys and values of its layers."""
        self.tokens, self.route, self.kv, self.length = [token], route, kv, len(self.prompt)
        self.layers = sum(1 << layer for layer in kv)


class Progress(NamedTuple):
    """What one turn of a batch gave."""

    tokens: dict[Request, int]  # the next token of each request that got one
    ended: list[Request]


class _Reading:
    """A tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._host = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def tolist(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class ContinuousBatch:
    """Rows that decode together and prompts that wait, over one step; `DecodeEngine.batch` makes it.

    Waiting prompts are prefilled together, in the order in which they came, as soon as there is a place and fewer than
    `reserve` others are prefilled. Of these, the one whose route adds the fewest layers to the batch gets the next
    place, as long as none is overtaken more than `patience` times: a decode step reads the weights of every layer that
    some row runs.

    Attributes:
        waiting: Requests that are not prefilled.
        ready: Prefilled requests without a place.
        active: Requests that decode, as numbered by the step.
        steps: Decode steps until now.
        layers_read: Layers that some row ran, summed over these steps.
        closed: Set when another batch has taken over the step.
    """

    def __init__(
        self,
        step: LlamaStep,
        prefill: Callable[[list[Request]], None],
        max_batch_size: int,
        lookahead: int,
        patience: int,
        reserve: int,
    ) -> None:
        self._step, self._prefill, self._size = step, prefill, max_batch_size
        self._most_ahead, self._patience, self._reserve = lookahead, patience, max(1, reserve)
        self.waiting: deque[Request] = deque()
        self.ready: list[Request] = []
        self.active: list[Request] = []
        self.steps = self.layers_read = 0
        self.closed = False
        self._on_the_way: deque[_Reading] = deque()
        self._next: Tensor | None = None  # tokens that the next step takes, while the rows stay what they are
        self._left = 0  # steps until some row ends or runs fewer layers
        self._lookahead = 0  # steps given to the device before the first of them is read
        step.clear()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.ready or self.active)

    @property
    def union_layers(self) -> float:
        """Layers that a decode step ran for some row, mean until now."""
        return self.layers_read / max(1, self.steps)

    def add(self, request: Request) -> None:
        """Put a request behind those that wait; it joins as soon as there is a place."""
        self.waiting.append(request)
        self._left = 0

    def cancel(self, request: Request) -> None:
        """Forget a request; the others do not notice."""
        request.cancelled = True
        self._left = 0
        for queue in (self.waiting, self.ready):
            if request in queue:
                queue.remove(request)

    @torch.inference_mode(False)
    @torch.no_grad()
    def advance(self) -> Progress:
        """Prefill what waits if there is a place, else read one more token of every row.

        Raises:
            ValueError: Another batch has taken over.
        """
        if self.closed:
            raise ValueError(
                "another call of this engine began before all rows of this one were taken: take them all first, "
                "or make a second engine"
            )
        if not self._on_the_way and not self._left:
            for place in reversed(range(len(self.active))):
                if self.active[place].cancelled:
                    self._leave(place)
            while len(self.active) < self._size:
                if len(self.ready) < self._reserve and self._fits(self.waiting):
                    return self._start(self._next_prompts())
                if not self._fits(self.ready):
                    break
                self._join(self._next_ready())
            if not self.active:
                return Progress({}, [])
            self._left = self._safe_steps()
            careful = any(row.exit_rule or not row.draws_alone for row in self.active)
            self._lookahead = 0 if careful else self._most_ahead
        while self._left and len(self._on_the_way) <= self._lookahead:
            self._give_step()
        return self._read_step()

    # -- who is next --

    def _fits(self, queue: Sequence[Request]) -> bool:
        """Whether the first of a queue may decode beside the rows that do: all leave early by one rule, or none."""
        return bool(queue) and (not self.active or queue[0].exit_rule == self.active[0].exit_rule)

    def _next_prompts(self) -> list[Request]:
        """The first that waits, and those behind it whose prompts run the same layers, taken out of the queue."""
        kind = _kind(self.waiting[0])
        chosen = [request for request in self.waiting if _kind(request) == kind][: self._size]
        taken = set(chosen)
        self.waiting = deque(request for request in self.waiting if request not in taken)
        return chosen

    def _next_ready(self) -> Request:
        """The prefilled request that adds the fewest layers, of several the one that runs the most; or the oldest once
        it has been overtaken often enough."""
        place, union, oldest = 0, self._union(), self.ready[0]
        if oldest.overtaken < self._patience:
            fits = {
                index: ((each.layers & ~union).bit_count(), -each.layers.bit_count())
                for index, each in enumerate(self.ready)
                if each.exit_rule == oldest.exit_rule
            }
            place = min(fits, key=fits.__getitem__)
        for other in self.ready[:place]:
            other.overtaken += 1
        return self.ready.pop(place)

    def _union(self) -> int:
        return reduce(or_, (row.layers for row in self.active), 0)

    # -- rows --

    def _start(self, requests: list[Request]) -> Progress:
        self._prefill(requests)
        self.ready += [request for request in requests if not request.ended]
        ended = [request for request in requests if request.ended]
        return self._progress({request: request.tokens[0] for request in requests}, ended)

    def _join(self, request: Request) -> None:
        self._step.join(request.kv, request.length)
        request.kv.clear()
        self.active.append(request)
        self._next = None

    def _leave(self, place: int) -> None:
        """Take a row out; the last one gets its place."""
        self._step.leave(place)
        last = self.active.pop()
        if place < len(self.active):
            self.active[place] = last
        self._next = None

    def _settle(self) -> list[Request]:
        """Take out the rows that have ended, and drop the layers that the others run no more."""
        ended = []
        for place in reversed(range(len(self.active))):
            row = self.active[place]
            if row.ended:
                self._leave(place)
                if not row.cancelled:
                    ended.append(row)
            elif layers := row.drops.get(len(row.tokens) - 1):
                self._step.drop(place, layers)
                row.layers &= ~sum(1 << layer for layer in layers)
        return ended

    # -- steps --

    def _safe_steps(self) -> int:
        """How many steps no row is too long for, and none runs other layers than now."""
        until_drops = (step - len(row.tokens) + 1 for row in self.active for step in row.drops)
        until_ends = [row.max_new_tokens - len(row.tokens) for row in self.active]
        return min(until_ends + [steps for steps in until_drops if steps > 0])

    def _give_step(self) -> None:
        if self._next is None:
            self._next = torch.tensor([row.tokens[-1] for row in self.active], device=self._step.embedding.device)
        self._next = choose_each(self._logits(self._next), [row.choose for row in self.active])
        self._on_the_way.append(_Reading(self._next))
        self._left -= 1
        self.steps += 1
        self.layers_read += self._union().bit_count()

    def _logits(self, tokens: Tensor) -> Tensor:
        """[B, V] after one more token [B] of every row."""
        rule = self.active[0].exit_rule
        if rule is None:
            return self._step(tokens)
        steps = torch.tensor([len(row.tokens) - 1 for row in self.active], device=tokens.device)
        logits, depths = self._step.exit_early(tokens, rule, steps)
        for row, depth in zip(self.active, depths.tolist(), strict=True):
            row.depths.append(depth)
        return logits

    def _read_step(self) -> Progress:
        read = {}
        for row, token in zip(self.active, self._on_the_way.popleft().tolist(), strict=True):
            if not row.ended and not row.cancelled:  # else the step was in vain
                row.tokens.append(token)
                row.length += 1
                read[row] = token
        if any(row.ended for row in self.active):
            self._left = 0
        return self._progress(read, [] if self._left or self._on_the_way else self._settle())

    def _progress(self, read: dict[Request, int], ended: list[Request]) -> Progress:
        for request in ended:
            request.union_layers = self.union_layers
        return Progress(read, ended)


def choose_each(logits: Tensor, choosers: Sequence[Chooser]) -> Tensor:
    """Next tokens [B] of logits [B, V]: rows that share a chooser are chosen together, in their order."""
    places: dict[Chooser, list[int]] = {}
    for place, choose in enumerate(choosers):
        places.setdefault(choose, []).append(place)
    if len(places) == 1:
        return choosers[0](logits)
    tokens = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for choose, rows in places.items():
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = choose(logits[index])
    return tokens


def _kind(request: Request) -> Hashable:
    """Prompts of one kind may be prefilled together."""
    rule = request.rule
    return RoutersDecide if rule is None else type(rule) if type(rule) in (RoutersDecide, FixedRoutes) else rule


def routes_together(requests: Sequence[Request], num_layers: int, default_rate: Callable[[], float]) -> Routes | None:
    """The routes of prompts of one kind, as one decision for all of them."""
    rules = [request.rule for request in requests]
    if all(rule is rules[0] for rule in rules):
        return rules[0]
    if isinstance(rules[0], FixedRoutes):
        return FixedRoutes(torch.cat(list(_fixed(rules, num_layers))))
    rates = [getattr(rule, "skip_rate", None) for rule in rules]
    if all(rate is None for rate in rates):
        return None
    return RoutersDecide(torch.tensor([default_rate() if rate is None else float(rate) for rate in rates]))


def _fixed(rules: Sequence[Routes | None], num_layers: int) -> Iterator[Tensor]:
    for rule in rules:
        assert rule is not None
        yield rule.first(num_layers).cpu()
