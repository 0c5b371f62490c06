"""The decode engine gives the tokens of `RouterAugmentedLM.generate`, faster: rows are decoded together whatever their
routes are, each layer for the rows that run it, and a row that ends gives its place to a waiting prompt.
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
from firstlab.engine.prefill import read_through_model
from firstlab.engine.sampling import Sampling, chooser
from firstlab.model.generation_options import check_score_settings, stop_tokens
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import RoutersDecide, Routes, as_asked, layer_skips

MODES = ("auto", "eager", "graphs")


@dataclass
class EngineOutput:
    """What `DecodeEngine.generate` gives."""

    tokens: list[list[int]]  # new tokens of every prompt, with the EOS token that ended it
    routes: Tensor  # [B, L] boolean, the layers that the first decode step may run
    layer_skips: Tensor  # [B, L], the share of the prompt's decode steps that skipped the layer
    kv_bytes: int  # keys and values that the prompts' layers kept, at their final lengths
    kv_bytes_dense: int  # the same if no layer were skipped

    @property
    def skip_rate(self) -> Tensor:
        """[B], skipped layers ÷ L of every prompt, mean over its decode steps."""
        return self.layer_skips.mean(1)


@dataclass
class _Row:
    """A prefilled prompt."""

    index: int
    length: int  # tokens whose keys and values it has
    tokens: list[int]  # response
    route: Tensor  # [L], layers of the first decode step
    kv: dict[int, Tensor]  # layer to [2, kv heads, length, head dim], until it gets a place in the batch
    depths: list[int] = field(default_factory=list)  # layers that each decode step ran under `EarlyExit`


@dataclass
class _Task:
    """What all rows of one call have in common."""

    prompts: Sequence[Sequence[int]]
    routes: Routes | None
    choose: Callable[[Tensor], Tensor]  # next tokens [B] of logits [B, V]
    limits: Sequence[int]  # new tokens of each prompt, at most
    ends: set[int]  # tokens that end a row
    lookahead: int  # steps given to the device before the first of them is read
    notify: Callable[[dict[int, int]], None]  # called with what has been read, prompt to token
    dropped: dict[int, list[int]]  # decode step to the layers that the step before still ran

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
        model: Llama-like, without unmerged LoRA. Its projections become views of fused ones, which saving, copying and
            further engines do not mind; a model moved or converted by `to` needs a new engine.
        max_length: Tokens of prompt and response.
        max_batch_size: Rows decoded together, and prompts prefilled together.
        mode: "eager" (`LlamaStep`), "graphs" (`GraphStep`: CUDA graphs, on a CPU the same without them) or "auto",
            which is graphs on CUDA, else eager.
        lookahead: Decode steps that the device is given before the tokens of the first of them are read; a step is in
            vain where a row ends. None: 1 on CUDA, else 0. Sampling and `EarlyExit` go without it.
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
        on_cuda = model.device.type == "cuda"
        self.lookahead = int(on_cuda) if lookahead is None else lookahead
        sizes = (("max_length", max_length, 1), ("max_batch_size", max_batch_size, 1), ("lookahead", self.lookahead, 0))
        for name, value, least in sizes:
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.model, self.max_length, self.max_batch_size = model, max_length, max_batch_size
        self.mode = mode if mode != "auto" else "graphs" if on_cuda else "eager"
        if self.mode == "eager":
            self.step = LlamaStep(model.lm, max_batch_size, max_length)
        else:
            self.step = GraphStep(model.lm, max_batch_size, max_length, Graphs(model.device))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        routes: Routes | Tensor | None = None,
        eos: Sequence[int] | None = None,
        on_step: Callable[[dict[int, int]], None] | None = None,
        sampling: Sampling | None = None,
        skip_rate: float | Tensor | None = None,
    ) -> EngineOutput:
        """Decode every prompt.

        Args:
            prompts: Token ids of each, without padding.
            max_new_tokens: At most, for all prompts or for each.
            routes: A boolean tensor [L] or [B, L], or any `Routes`; None: the routers decide.
            eos: Tokens that end a row; the model's own by default, () for none.
            on_step: Called after prefill and after each decode step, when its tokens are on the host: prompt to token.
            sampling: How tokens are drawn; None: greedy.
            skip_rate: How much routers of any rate are to skip, for all prompts or [B]; see `RouteRouter`.
        """
        found = dict(self.as_completed(prompts, max_new_tokens, routes, eos, on_step, sampling, skip_rate))
        outputs = [found[index] for index in range(len(prompts))]
        return EngineOutput(
            [output.tokens[0] for output in outputs],
            torch.cat([output.routes for output in outputs]),
            torch.cat([output.layer_skips for output in outputs]),
            sum(output.kv_bytes for output in outputs),
            sum(output.kv_bytes_dense for output in outputs),
        )

    def as_completed(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        routes: Routes | Tensor | None = None,
        eos: Sequence[int] | None = None,
        on_step: Callable[[dict[int, int]], None] | None = None,
        sampling: Sampling | None = None,
        skip_rate: float | Tensor | None = None,
    ) -> Iterator[tuple[int, EngineOutput]]:
        """As `generate`, but each prompt as soon as it has ended: its place among `prompts`, and its output (B = 1)."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        rule = as_asked(routes, skip_rate)
        # What cannot work is refused here, not when the first row is asked for.
        check_score_settings(self.model.lm.generation_config, drawn=sampling is not None)
        self._check(prompts, limits, rule)
        task = _Task(
            prompts,
            rule,
            chooser(sampling, self.model.device),
            limits,
            set(stop_tokens(self.model.lm, None) if eos is None else eos),
            # A step in vain would draw for the other rows, too.
            0 if sampling is not None or (rule is not None and rule.exit_rule) else self.lookahead,
            on_step or (lambda tokens: None),
            {} if rule is None else rule.drops(),
        )
        return self._outputs(task)

    def _outputs(self, task: _Task) -> Iterator[tuple[int, EngineOutput]]:
        """The outputs of one call, as long as no other one has taken the places of the batch."""
        self._call = call = object()
        for row in self._decode(task):
            yield row.index, self._output(row, task.routes)
            if self._call is not call:
                raise ValueError(
                    "another call of this engine began before all rows of this one were taken: take them all first, "
                    "or make a second engine"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _decode(self, task: _Task) -> Iterator[_Row]:
        waiting = deque(range(len(task.prompts)))
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
                rows = self._prefill(batch, task)
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

    def _output(self, row: _Row, rule: Routes | None) -> EngineOutput:
        steps, layers = len(row.tokens) - 1, len(row.route)
        schedule = None if rule is None else rule.window(0, steps)
        ran = row.route.expand(steps, -1) if schedule is None else schedule
        if row.depths:
            ran = torch.arange(layers) < torch.tensor(row.depths).unsqueeze(1)
        skips = 1 - row.route[None].float()
        if rule is not None and rule.decides_each_step:
            skips = layer_skips(ran[None], torch.ones(1, steps, dtype=torch.bool))
        # Above an exit every layer keeps what the token had there.
        holds = row.route if row.depths or not steps else ran[-1]
        kv_bytes = row.length * self.step.bytes_per_token
        return EngineOutput([row.tokens], row.route[None], skips, int(holds.sum()) * kv_bytes, layers * kv_bytes)

    def _check(self, prompts: Sequence[Sequence[int]], limits: Sequence[int], routes: Routes | None) -> None:
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
        if isinstance(routes, RoutersDecide):
            self.model.routers.checked_rate(routes.skip_rate, len(prompts))

    def _prefill(self, batch: list[int], task: _Task) -> list[_Row]:
        prompts = [task.prompts[index] for index in batch]
        rule = None if task.routes is None else task.routes.rows(batch)
        if isinstance(self.step, GraphStep) and not (rule is not None and rule.skips_prompt):
            read = self.step.read(prompts, self.model.routers, rule)
        else:
            read = read_through_model(self.model, prompts, rule)
        first, rows = task.choose(read.logits).tolist(), []
        for place, route in enumerate(read.routes.cpu()):
            kv = {layer: read.keys_values(place, layer) for layer in route.nonzero()[:, 0].tolist()}
            rows.append(_Row(batch[place], len(prompts[place]), [first[place]], route, kv))
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
    """An engine that leaves the model as it is to the last bit: it gets a copy where it would order weights anew."""
    return DecodeEngine(deepcopy(model) if orders_anew(model.lm) else model, max_length, max_batch_size)
