"""The decode engine: the tokens of greedy `RouterAugmentedLM.generate`, faster.

Prompts are prefilled together through the wrapped model; then rows that share a route are decoded together. A row that
ends gives its place to a waiting prompt of the same route.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from firstlab.model.early_exit import EarlyExit
from firstlab.model.llama_step import LlamaStep
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import Routes, StepRoutes, check_routes


@dataclass
class EngineOutput:
    """What `DecodeEngine.generate` gives.

    Attributes:
        tokens: New tokens of every prompt, with the EOS token that ended it.
        routes: [B, L] boolean, true where decode ran the layer; of the first step for `StepRoutes`.
        kv_bytes: Keys and values that the prompts' layers kept, at their final lengths.
        kv_bytes_dense: The same if no layer were skipped.
    """

    tokens: list[list[int]]
    routes: Tensor
    kv_bytes: int
    kv_bytes_dense: int


@dataclass
class _Row:
    """A prefilled prompt. `kv`: layer to [2, kv heads, length, head dim], until it gets a place in the batch."""

    index: int
    length: int
    tokens: list[int]
    route: tuple[bool, ...]
    kv: dict[int, Tensor] = field(default_factory=dict)


class DecodeEngine:
    """Greedy routed decoding over static keys and values.

    Args:
        model: Llama-like, without unmerged LoRA. Its fused projections are views of shared storage from now on, which
            saving, copying and further engines do not mind. A model moved or converted by `to` needs a new engine.
        max_length: Tokens of prompt and response.
        max_batch_size: Rows decoded together, and prompts prefilled together.

    Raises:
        ValueError: Unsupported architecture, unmerged LoRA, or a size below 1.
    """

    def __init__(self, model: RouterAugmentedLM, max_length: int, max_batch_size: int = 1) -> None:
        if model.has_lora:
            raise ValueError("the decode engine runs merged weights only: call model.merge_and_unload() first")
        for name, value in (("max_length", max_length), ("max_batch_size", max_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model, self.max_length, self.max_batch_size = model, max_length, max_batch_size
        self.step = LlamaStep(model.lm, max_batch_size, max_length)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        routes: Routes | None = None,
        eos: Sequence[int] | None = None,
        on_token: Callable[[], None] | None = None,
    ) -> EngineOutput:
        """Decode every prompt greedily.

        Args:
            prompts: Token ids of each, without padding.
            max_new_tokens: At most, per prompt.
            routes: [L] or [B, L] boolean, or `StepRoutes`; None: the routers decide.
            eos: Tokens that end a row; the model's own by default, () for none.
            on_token: Called after prefill and after each decode step, when its tokens are on the host.

        Raises:
            ValueError: No or empty prompts, too long for `max_length`, routes that do not fit, or a model that was
                moved or converted after the engine was made.
        """
        self._check(prompts, max_new_tokens, routes)
        if eos is None:
            given = self.model.lm.generation_config.eos_token_id
            eos = [] if given is None else given if isinstance(given, list) else [given]
        ends, notify = set(eos), on_token or (lambda: None)
        waiting = list(range(len(prompts)))
        done: list[_Row] = []
        ready: list[_Row] = []

        def refill() -> None:
            batch, waiting[:] = waiting[: self.max_batch_size], waiting[self.max_batch_size :]
            for row in self._prefill(prompts, batch, routes):
                finished = len(row.tokens) >= max_new_tokens or row.tokens[-1] in ends
                (done if finished else ready).append(row)
            notify()

        while waiting or ready:
            if not ready:
                refill()
                continue
            # The most common route first: it fills the batch best.
            counts = [row.route for row in ready]
            route = max(counts, key=counts.count)
            done += self._decode(route, ready, waiting, refill, routes, max_new_tokens, ends, notify)
        done.sort(key=lambda row: row.index)
        per_token = self.step.bytes_per_token
        return EngineOutput(
            [row.tokens for row in done],
            torch.tensor([row.route for row in done]),
            sum(row.length * sum(row.route) * per_token for row in done),
            sum(row.length * len(row.route) * per_token for row in done),
        )

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, routes: Routes | None) -> None:
        if not self.step.is_current():
            raise ValueError("the model was moved or converted after its engine was made; make a new DecodeEngine")
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("every prompt needs at least one token (for instance the BOS token)")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        needed = max(map(len, prompts)) + max_new_tokens
        if needed > self.max_length:
            raise ValueError(f"a prompt with max_new_tokens={max_new_tokens} takes {needed} tokens; raise max_length")
        if isinstance(routes, EarlyExit):
            raise ValueError("EarlyExit does not run on the decode engine; use RouterAugmentedLM.generate")
        if routes is not None:
            check_routes(routes, self.model.num_layers)
            if isinstance(routes, Tensor) and routes.ndim == 2 and len(routes) != len(prompts):
                raise ValueError(f"routes has {len(routes)} rows for {len(prompts)} prompts; give one row per prompt")

    def _prefill(self, prompts: Sequence[Sequence[int]], batch: list[int], routes: Routes | None) -> list[_Row]:
        width, device = max(len(prompts[index]) for index in batch), self.model.device
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, index in enumerate(batch):
            ids[place, width - len(prompts[index]) :] = torch.as_tensor(prompts[index])
            mask[place, width - len(prompts[index]) :] = 1
        forced = routes[batch] if isinstance(routes, Tensor) and routes.ndim == 2 else routes
        cache = self.model.new_cache(routes=forced)
        out = self.model(ids.to(device), mask.to(device), past_key_values=cache, logits_to_keep=1)
        first = out.logits[:, -1].argmax(-1).tolist()
        assert cache.routes is not None
        rows = []
        for place, (index, route) in enumerate(zip(batch, cache.routes.tolist(), strict=True)):
            length = len(prompts[index])
            kv = {
                layer: torch.stack([cached.keys[place, :, -length:], cached.values[place, :, -length:]])
                for layer, (cached, runs) in enumerate(zip(cache.layers, route, strict=True))
                if runs
            }
            rows.append(_Row(index, length, [first[place]], tuple(route), kv))
        return rows

    def _decode(
        self,
        route: tuple[bool, ...],
        ready: list[_Row],
        waiting: list[int],
        refill: Callable[[], None],
        routes: Routes | None,
        max_new_tokens: int,
        ends: set[int],
        notify: Callable[[], None],
    ) -> list[_Row]:
        """Decode rows of one route until none is left, taking them from `ready`."""
        schedule = routes if isinstance(routes, StepRoutes) else None
        layers = [layer for layer, runs in enumerate(route) if runs]
        active: list[_Row] = []
        done: list[_Row] = []
        steps = 0
        while True:
            # Under a schedule all rows must stand at the same step, so that nobody joins later.
            if schedule is None or not active:
                self._join(active, ready, route, layers)
                if schedule is None and active and len(active) < self.max_batch_size and waiting and not ready:
                    refill()
                    self._join(active, ready, route, layers)
            if schedule is not None:
                layers = schedule.window(steps, 1)[0].nonzero().flatten().tolist()
            tokens = torch.tensor([row.tokens[-1] for row in active], device=self.model.device)
            logits = self.step(tokens, [row.length for row in active], layers)
            for row, token in zip(active, logits.argmax(-1).tolist(), strict=True):
                row.tokens.append(token)
                row.length += 1
            steps += 1
            notify()
            for place in reversed(range(len(active))):
                row = active[place]
                if len(row.tokens) >= max_new_tokens or row.tokens[-1] in ends:
                    done.append(row)
                    last = active.pop()
                    if last is not row:
                        active[place] = last
                        self.step.move(len(active), place, last.length, layers)
            if not active and (schedule is not None or not any(row.route == route for row in ready)):
                return done

    def _join(self, active: list[_Row], ready: list[_Row], route: tuple[bool, ...], layers: list[int]) -> None:
        for row in [each for each in ready if each.route == route][: self.max_batch_size - len(active)]:
            ready.remove(row)
            for layer in layers:
                self.step.reserve(layer)[:, len(active), :, : row.length] = row.kv[layer]
            row.kv.clear()
            active.append(row)
