"""The decode engine: the tokens of `RouterAugmentedLM.generate`, faster.

Prompts are prefilled together through the wrapped model; then rows are decoded together whatever their routes are, each
layer for the rows that run it. A row that ends gives its place to a waiting prompt.

On a GPU a step is a list of CUDA graphs (`GraphStep`), and the device is a step ahead: tokens are fed back there, and
read while the next step runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from firstlab.engine.graph_step import GraphStep
from firstlab.engine.graphs import Graphs
from firstlab.engine.llama_step import LlamaStep, orders_anew
from firstlab.engine.sampling import Sampling, chooser
from firstlab.model.generation_options import check_score_settings, stop_tokens
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import Routes, as_routes, layer_skips

MODES = ("auto", "eager", "graphs")


@dataclass
class EngineOutput:
    """What `DecodeEngine.generate` gives.

    Attributes:
        tokens: New tokens of every prompt, with the EOS token that ended it.
        routes: [B, L] boolean, true where decode ran the layer; of the first step for `StepRoutes`, true everywhere for
            `EarlyExit`.
        layer_skips: [B, L] in [0, 1], the share of the prompt's decode steps that skipped the layer; 0 without steps
            under `StepRoutes` and `EarlyExit`.
        kv_bytes: Keys and values that the prompts' layers kept, at their final lengths.
        kv_bytes_dense: The same if no layer were skipped.
    """

    tokens: list[list[int]]
    routes: Tensor
    layer_skips: Tensor
    kv_bytes: int
    kv_bytes_dense: int

    @property
    def skip_rate(self) -> Tensor:
        """[B], skipped layers ÷ L of every prompt, mean over its decode steps."""
        return self.layer_skips.mean(1)


@dataclass
class _Row:
    """A prefilled prompt.

    Attributes:
        index: Of the prompt.
        length: Tokens whose keys and values it has.
        tokens: Response.
        route: Layers of the first decode step, [L].
        kv: Layer to [2, kv heads, length, head dim], until it gets a place in the batch.
        depths: Layers that each decode step ran under `EarlyExit`.
    """

    index: int
    length: int
    tokens: list[int]
    route: Tensor
    kv: dict[int, Tensor] = field(default_factory=dict)
    depths: list[int] = field(default_factory=list)

    def ran(self, rule: Routes | None) -> Tensor:
        """[steps, L] boolean, the layers that each decode step ran."""
        if self.depths:
            return torch.arange(len(self.route)) < torch.tensor(self.depths).unsqueeze(1)
        steps = len(self.tokens) - 1
        schedule = None if rule is None else rule.window(0, steps)
        return self.route.expand(steps, -1) if schedule is None else schedule


@dataclass
class _Task:
    """What all rows of one call have in common.

    Attributes:
        routes: As given.
        choose: Next tokens [B] of logits [B, V].
        limits: New tokens of each prompt, at most.
        ends: Tokens that end a row.
        lookahead: Steps given to the device before the first of them is read.
        notify: Called with what has been read, prompt to token.
        dropped: Decode step to the layers that the step before still ran.
    """

    routes: Routes | None
    choose: Callable[[Tensor], Tensor]
    limits: Sequence[int]
    ends: set[int]
    lookahead: int
    notify: Callable[[dict[int, int]], None]
    dropped: dict[int, list[int]]

    def has_ended(self, row: _Row) -> bool:
        return len(row.tokens) >= self.limits[row.index] or row.tokens[-1] in self.ends

    def safe_steps(self, rows: list[_Row]) -> int:
        """How many steps no row is too long for, and none runs other layers than now."""
        until_drops = (step - len(row.tokens) + 1 for step in self.dropped for row in rows)
        return min([self.limits[row.index] - len(row.tokens) for row in rows] + [n for n in until_drops if n > 0])


class _Reading:
    """A tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._host = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def tolist(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class DecodeEngine:
    """Routed decoding over static keys and values, greedy or sampled.

    Args:
        model: Llama-like, without unmerged LoRA. Its fused projections are views of shared storage from now on (of
            columns, where that is faster), which saving, copying and further engines do not mind. A model moved or
            converted by `to` needs a new engine.
        max_length: Tokens of prompt and response.
        max_batch_size: Rows decoded together, and prompts prefilled together.
        mode: "eager" (`LlamaStep`), "graphs" (`GraphStep`: CUDA graphs, on a CPU the same without them) or "auto",
            which is graphs on CUDA, else eager.
        lookahead: Decode steps that the device is given before the tokens of the first of them are read. The tokens are
            the same, but a step is in vain where a row ends. None: 1 on CUDA, else 0. Sampling and `EarlyExit` go
            without it.

    Raises:
        ValueError: Unsupported architecture, unmerged LoRA, an unknown mode, or a size out of range.
    """

    # Weights that are ordered anew, keys and values outlive an inference mode that is on now.
    @torch.inference_mode(False)
    def __init__(
        self,
        model: RouterAugmentedLM,
        max_length: int,
        max_batch_size: int = 1,
        mode: str = "auto",
        lookahead: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r} is unknown; choose one of {', '.join(MODES)}")
        if model.has_lora:
            raise ValueError("the decode engine runs merged weights only: call model.merge_and_unload() first")
        for name, value in (("max_length", max_length), ("max_batch_size", max_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        on_cuda = model.device.type == "cuda"
        self.lookahead = int(on_cuda) if lookahead is None else lookahead
        if self.lookahead < 0:
            raise ValueError(f"lookahead={lookahead} must be at least 0")
        self.model, self.max_length, self.max_batch_size = model, max_length, max_batch_size
        self.mode = mode if mode != "auto" else "graphs" if on_cuda else "eager"
        self.step = (
            LlamaStep(model.lm, max_batch_size, max_length)
            if self.mode == "eager"
            else GraphStep(model.lm, max_batch_size, max_length, Graphs(model.device))
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        routes: Routes | Tensor | None = None,
        eos: Sequence[int] | None = None,
        on_step: Callable[[dict[int, int]], None] | None = None,
        sampling: Sampling | None = None,
    ) -> EngineOutput:
        """Decode every prompt.

        Args:
            prompts: Token ids of each, without padding.
            max_new_tokens: At most, for all prompts or for each.
            routes: A boolean tensor [L] or [B, L], or any `Routes`; None: the routers decide.
            eos: Tokens that end a row; the model's own by default, () for none.
            on_step: Called after prefill and after each decode step, when its tokens are on the host: prompt to token.
            sampling: How tokens are drawn; None: greedy.

        Raises:
            ValueError: No or empty prompts, too long for `max_length`, routes that do not fit, or a model that was
                moved or converted after the engine was made.
        """
        routes = None if routes is None else as_routes(routes)
        rows = list(self._rows(prompts, max_new_tokens, routes, eos, on_step, sampling))
        return self._output(sorted(rows, key=lambda row: row.index), routes)

    def as_completed(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        routes: Routes | Tensor | None = None,
        eos: Sequence[int] | None = None,
        on_step: Callable[[dict[int, int]], None] | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[tuple[int, EngineOutput]]:
        """As `generate`, but each prompt as soon as it has ended: its place among `prompts`, and its output (B = 1)."""
        forced = None if routes is None else as_routes(routes)
        rows = self._rows(prompts, max_new_tokens, forced, eos, on_step, sampling)
        return ((row.index, self._output([row], forced)) for row in rows)

    def _rows(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        routes: Routes | None,
        eos: Sequence[int] | None,
        on_step: Callable[[dict[int, int]], None] | None,
        sampling: Sampling | None,
    ) -> Iterator[_Row]:
        """Every prompt's row, as they end. What cannot work is refused here, not when the first row is asked for."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        self._check(prompts, limits, routes, sampling is not None)
        task = _Task(
            routes,
            chooser(sampling, self.model.device),
            limits,
            set(stop_tokens(self.model.lm, None) if eos is None else eos),
            # A step in vain would draw for the other rows, too.
            0 if sampling is not None or (routes is not None and routes.exit_rule) else self.lookahead,
            on_step or (lambda tokens: None),
            {} if routes is None else routes.drops(),
        )
        return self._undisturbed(self._decode(prompts, task))

    def _undisturbed(self, rows: Iterator[_Row]) -> Iterator[_Row]:
        """The rows of one call, as long as no other one has taken the places of the batch."""
        self._call = call = object()
        for row in rows:
            yield row
            if self._call is not call:
                raise ValueError(
                    "another call of this engine began before all rows of this one were taken: take them all first, "
                    "or make a second engine"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _decode(self, prompts: Sequence[Sequence[int]], task: _Task) -> Iterator[_Row]:
        waiting = deque(range(len(prompts)))
        ready: deque[_Row] = deque()
        active: list[_Row] = []  # as numbered by the step
        self.step.clear()

        while waiting or ready or active:
            free = self.max_batch_size - len(active)
            if free and ready:
                row = ready.popleft()
                self.step.join(row.kv, row.length)
                row.kv.clear()
                active.append(row)
            elif free and waiting:
                batch = [waiting.popleft() for _ in range(min(len(waiting), self.max_batch_size))]
                rows = self._prefill(prompts, batch, task)
                task.notify({row.index: row.tokens[0] for row in rows})
                for row in rows:
                    if task.has_ended(row):
                        yield row
                    else:
                        ready.append(row)
            else:
                self._advance(active, task)
                for place in reversed(range(len(active))):
                    row = active[place]
                    if task.has_ended(row):
                        self.step.leave(place)
                        last = active.pop()
                        if last is not row:
                            active[place] = last
                        yield row
                    elif layers := task.dropped.get(len(row.tokens) - 1):
                        self.step.drop(place, layers)

    def _output(self, rows: list[_Row], routes: Routes | None) -> EngineOutput:
        fixed = routes is None or not routes.decides_each_step
        skips, kept = [], 0
        for row in rows:
            ran = row.ran(routes)
            counted = torch.ones(1, len(ran), dtype=torch.bool)
            skips.append(1 - row.route.float() if fixed else layer_skips(ran.unsqueeze(0), counted)[0])
            # Above an exit every layer keeps what the token had there.
            holds = row.route if row.depths or not len(ran) else ran[-1]
            kept += row.length * int(holds.sum())
        per_token = self.step.bytes_per_token
        dense = sum(row.length for row in rows) * self.model.num_layers
        every_route = torch.stack([row.route for row in rows])
        return EngineOutput(
            [row.tokens for row in rows], every_route, torch.stack(skips), kept * per_token, dense * per_token
        )

    def _check(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], routes: Routes | None, drawn: bool
    ) -> None:
        check_score_settings(self.model.lm.generation_config, drawn)
        if self.model.has_lora:
            raise ValueError("the model got LoRA after its engine was made; merge_and_unload() it, make a new engine")
        if not self.step.is_current():
            raise ValueError("the model was moved or converted after its engine was made; make a new DecodeEngine")
        if torch.is_autocast_enabled(self.model.device.type):
            raise ValueError("the engine computes in the model's own type: load the model in it instead of autocast")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("every prompt needs at least one token (for instance the BOS token)")
        if len(limits) != len(prompts):
            raise ValueError(f"max_new_tokens has {len(limits)} values for {len(prompts)} prompts; give one per prompt")
        if min(limits) < 1:
            raise ValueError(f"max_new_tokens={min(limits)} must be at least 1")
        needed, limit = max((len(prompt) + limit, limit) for prompt, limit in zip(prompts, limits, strict=True))
        if needed > self.max_length:
            raise ValueError(f"a prompt with max_new_tokens={limit} takes {needed} tokens; raise max_length")
        if routes is not None:
            routes.check(self.model.num_layers, len(prompts))

    def _prefill(self, prompts: Sequence[Sequence[int]], batch: list[int], task: _Task) -> list[_Row]:
        routes = task.routes
        width, device = max(len(prompts[index]) for index in batch), self.model.device
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(batch):
            ids[place, width - len(prompts[index]) :] = torch.as_tensor(prompts[index])
            mask[place, width - len(prompts[index]) :] = 1
        cache = self.model.new_cache(routes=None if routes is None else routes.rows(batch))
        out = self.model(ids.to(device), mask.to(device), past_key_values=cache, logits_to_keep=1)
        first = task.choose(out.logits[:, -1]).tolist()
        assert cache.routes is not None
        rows = []
        for place, (index, route) in enumerate(zip(batch, cache.routes.cpu(), strict=True)):
            length = len(prompts[index])
            kv = {
                layer: torch.stack([cached.keys[place, :, -length:], cached.values[place, :, -length:]])
                for layer, (cached, runs) in enumerate(zip(cache.layers, route.tolist(), strict=True))
                if runs
            }
            rows.append(_Row(index, length, [first[place]], route, kv))
        return rows

    def _advance(self, active: list[_Row], task: _Task) -> None:
        """More tokens of every row, until one ends or is to run fewer layers."""
        tokens = torch.tensor([row.tokens[-1] for row in active], device=self.model.device)
        on_the_way: deque[_Reading] = deque()
        left = task.safe_steps(active)
        while left or on_the_way:
            if left:
                tokens = task.choose(self._logits(tokens, active, task.routes))
                on_the_way.append(_Reading(tokens))
                left -= 1
                if left and len(on_the_way) <= task.lookahead:
                    continue
            read = {}
            for row, token in zip(active, on_the_way.popleft().tolist(), strict=True):
                if not task.has_ended(row):  # else the step was in vain
                    row.tokens.append(token)
                    row.length += 1
                    read[row.index] = token
            task.notify(read)
            if any(map(task.has_ended, active)):
                left = 0

    def _logits(self, tokens: Tensor, active: list[_Row], routes: Routes | None) -> Tensor:
        """[B, V] after one more token [B] of every row."""
        if routes is None or routes.exit_rule is None:
            return self.step(tokens)
        steps = torch.tensor([len(row.tokens) - 1 for row in active], device=self.model.device)
        logits, depths = self.step.exit_early(tokens, routes.exit_rule, steps)
        for row, depth in zip(active, depths.tolist(), strict=True):
            row.depths.append(depth)
        return logits


def engine_for(model: RouterAugmentedLM, max_length: int, max_batch_size: int) -> DecodeEngine:
    """An engine for a model that other work goes on with: what it computes stays the same to the last bit.

    Where an engine would order the weights anew, which rounds differently, it gets a copy of the model.
    """
    return DecodeEngine(deepcopy(model) if orders_anew(model.lm) else model, max_length, max_batch_size)
