"""The KV cache that carries the routes: they belong to a prompt, so they follow its keys and values (§4.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers
from firstlab.model.routes import ExitPass, RoutersDecide, Routes, as_routes, decode_steps, layer_skips, with_state


class RoutedCache(DynamicCache):
    """A `DynamicCache` that measures rho during prefill, fixes the routes, and applies them to every later token.

    Prefill runs every layer. When the whole prompt has been seen, route = (rho >= threshold) and the keys and values
    of layers that no row runs are freed. Every later pass, of one token or many, runs exactly the routed layers.
    Routes with `skips_prompt` are in force from the first token of the prompt.

    Args:
        prompt_length: Padded length of a prompt that arrives in several chunks. None: the first pass is all of it.
        routes: Used instead of the routers' decision; rows are repeated when the batch is a multiple of them (beams).
        exit_head: Logits of intermediate states; for `EarlyExit`.
    """

    layers: list[Any]  # one attention cache per decoder layer, which `__init__` makes sure of

    def __init__(
        self,
        config: PretrainedConfig,
        routers: Routers | RouteRouter,
        prompt_length: int | None = None,
        routes: Routes | Tensor | None = None,
        exit_head: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(config=config)
        # Older transformers give every layer of RecurrentGemma an attention cache, used or not.
        blocks = set(getattr(config, "layers_block_type", None) or ())
        if (
            len(self.layers) != routers.num_layers
            or not all(hasattr(x, "get_mask_sizes") for x in self.layers)
            or not blocks <= {"attention"}
        ):
            raise ValueError(
                f"{type(config).__name__}: routed decoding needs one attention cache per decoder layer; state-space, "
                "recurrent and KV-sharing layers are not supported"
            )
        self._routers, self._prompt_length = routers, prompt_length
        self._forget()
        self._force(routes, exit_head)

    def _forget(self) -> None:
        self.routes: Tensor | None = None  # [B, L], the layers that the next token may run; None until decided
        self.rho: Tensor | None = None  # [B, L] fp32, None until then and for forced routes; 0 or 1 of a `RouteRouter`
        self.prompt_continues = False  # behind the next pass, whose end then decides nothing
        self._seen = self._prompt_seen = self._pass_tokens = 0
        self._pass_mask: Tensor | None = None
        self._readings: list[tuple[Tensor, ...]] = []  # of every layer of this pass
        self._sums: Tensor | None = None  # [B, L], of p over the prompt's passes
        self._counts: Tensor | None = None  # [B], of the prompt's tokens
        # Per layer: does any, does every token of the pass run it; and which do, broadcastable to [B, T, L].
        self._any_row: list[bool] = []
        self._all_rows: list[bool] = []
        self._gates: Tensor | None = None
        self._exits: ExitPass | None = None
        self._exit_record: list[Tensor] = []

    def _force(self, routes: Routes | Tensor | None, exit_head: Callable[[Tensor], Tensor] | None) -> None:
        rule = RoutersDecide() if routes is None else as_routes(routes)
        rule.check(self._routers.num_layers)
        if isinstance(rule, RoutersDecide):
            self._routers.checked_rate(rule.skip_rate)
        if rule.exit_rule is not None and exit_head is None:
            raise ValueError("EarlyExit asks the LM head after every layer: make the cache with model.new_cache()")
        if rule.skips_prompt and self._seen:
            raise ValueError("the prompt in past_key_values ran every layer, which PrunedRoutes forbid: start anew")
        self._rule, self._exit_head, self._measures = rule, exit_head, isinstance(rule, RoutersDecide)

    @property
    def decided(self) -> bool:
        """Whether the whole prompt has been read."""
        return self._prompt_seen > 0

    # -- one forward pass of the model, driven by the hooks and layers of `RouterAugmentedLM` --

    def expect_prompt(
        self, length: int, routes: Routes | None = None, exit_head: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Announce the padded length of the whole prompt, and routes to force, before the rest of it is read."""
        if routes is not None:
            self._force(routes, exit_head)
        self._prompt_length, self.prompt_continues = length, False

    def set_prompt_continues(self, value: bool) -> None:
        """Say whether the next pass leaves the prompt unfinished; ValueError if it is finished already."""
        if value and self.decided:
            raise ValueError(
                "prompt_continues=True: the route of past_key_values is decided already; start a new cache"
            )
        self.prompt_continues = value

    def begin_pass(self, batch_size: int, tokens: int, attention_mask: Tensor | None) -> None:
        """Called before the decoder runs: `tokens` new tokens per row, mask [B, seen + tokens] or None."""
        self._pass_tokens = tokens
        known = self._counts if self.routes is None else self.routes
        rows = None if known is None else len(known)
        if rows not in (None, batch_size):
            raise ValueError(
                f"past_key_values holds {rows} rows and the batch has {batch_size}; repeat the cached rows with "
                "past_key_values.batch_repeat_interleave(...)"
            )
        if self.routes is None and self._rule.skips_prompt:
            self._set_routes(self._forced_rows(batch_size, self._routers.device))
        if not self.decided:
            if attention_mask is not None and attention_mask.ndim != 2:
                raise ValueError("routing a prompt needs a 2-D attention_mask [batch, tokens] to leave out the padding")
            self._pass_mask = None if attention_mask is None else attention_mask[:, -tokens:].bool()
            self._readings = []
            return
        assert self.routes is not None
        gates = self._rule.window(self._steps, tokens)
        if gates is not None:
            self._any_row, self._all_rows = gates.any(0).tolist(), gates.all(0).tolist()
            self._gates = gates.unsqueeze(0)
        elif self._rule.exit_rule is not None:
            assert self._exit_head is not None
            response = self.routes.new_ones(len(self.routes), self._steps + tokens)
            if attention_mask is not None and attention_mask.ndim == 2:
                response = attention_mask[:, self._prompt_seen :].bool()
            steps = decode_steps(response)[:, -tokens:]
            self._exits = ExitPass(self._rule.exit_rule, self._exit_head, steps, self._routers.num_layers)

    @property
    def layers_run(self) -> list[bool]:
        """Whether the present pass runs each layer for some row."""
        return [True] * self._routers.num_layers if self.routes is None else self._any_row

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """Run layer `index` on hidden [B, T, D], skip it, or run it for some rows only."""
        if self.routes is None:
            if self._measures:
                self._readings.append(self._routers.readings(hidden, index, self._pass_mask))
            return run()
        if self._exits is not None:
            return self._exits.run_layer(index, hidden, run)
        if not self._any_row[index]:
            return skip()
        output = run()
        if self._all_rows[index]:
            return output
        assert self._gates is not None
        keep = self._gates[..., index].to(hidden.device).unsqueeze(-1)
        return with_state(output, torch.where(keep, output[0] if isinstance(output, tuple) else output, hidden))

    def end_pass(self) -> None:
        """Called after the decoder ran: count the tokens and, after the last prompt chunk, fix the routes."""
        self._seen += self._pass_tokens
        if not self.decided:
            if self._measures:
                self._pool()
            if not self.prompt_continues and self._seen >= (self._prompt_length or 0):
                self._fix_routes()
        elif self._exits is not None:
            self._exit_record.append(self._exits.ran)
            self._exits = None
        else:
            self._follow_schedule()
        self._sync_skipped_lengths()

    def _sync_skipped_lengths(self) -> None:
        # A sliding-window layer counts its tokens itself, and the masks of all such layers are sized by the first.
        if self.routes is None:
            return
        for layer, any_row in zip(self.layers, self._any_row, strict=True):
            if not any_row and hasattr(layer, "cumulative_length"):
                layer.cumulative_length = self._seen

    def _pool(self) -> None:
        # A mean over the whole prompt: chunks contribute sums and counts.
        mask = self._pass_mask
        if mask is None:
            rows = next(len(each[0]) for each in self._readings if each)
            mask = torch.ones(rows, self._pass_tokens, dtype=torch.bool, device=self._routers.device)
        sums = self._routers.sums(self._readings, mask)
        counts = mask.sum(-1).to(sums.device)
        self._readings = []
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts

    def _fix_routes(self) -> None:
        self._prompt_seen = self._seen
        if self._measures:
            assert self._sums is not None and self._counts is not None
            means = self._sums / self._counts.clamp_min(1).unsqueeze(1)
            assert isinstance(self._rule, RoutersDecide)
            rate = self._rule.skip_rate
            if isinstance(rate, Tensor) and rate.ndim:
                rate = _repeated(rate, len(means), "skip_rate")
            self.rho, routes = self._routers.decision(means, rate)
            self._set_routes(routes)
        elif self.routes is None:
            self._set_routes(self._forced_rows(self.layers[0].keys.shape[0], self.layers[0].keys.device))
        self._sums = self._counts = self._pass_mask = None
        self._free_skipped()

    def _forced_rows(self, rows: int, device: torch.device) -> Tensor:
        return _repeated(self._rule.first(self._routers.num_layers), rows, "routes").to(device)

    def _follow_schedule(self) -> None:
        upcoming, last = (self._rule.window(step, 1) for step in (self._steps, self._steps - self._pass_tokens))
        if upcoming is None or last is None or self.routes is None:
            return
        self._any_row = self._all_rows = upcoming[0].tolist()
        if not torch.equal(upcoming, last):
            self.routes = upcoming.expand(len(self.routes), -1).to(self.routes.device)
            self._free_skipped()

    def _free_skipped(self) -> None:
        # A layer that no row runs now runs never again.
        filled: Any = next((layer for layer in self.layers if layer.is_initialized), None)
        for layer, any_row in zip(self.layers, self._any_row, strict=True):
            if not any_row:
                source = layer if layer.is_initialized else filled
                if not layer.is_initialized:  # the prompt passed it by as well
                    layer.lazy_initialization(filled.keys, filled.values)
                # Zero length, not deleted: reordering and selecting rows still work on it.
                layer.keys, layer.values = (x[..., :0, :].clone() for x in (source.keys, source.values))

    def _set_routes(self, routes: Tensor) -> None:
        self.routes = routes
        # The one place where routes come to the host: layers that decode skips must not wait for the device.
        self._any_row, self._all_rows = torch.stack([routes.any(0), routes.all(0)]).tolist()
        self._gates = routes.unsqueeze(1)

    # -- what users and transformers ask a cache --

    @property
    def _steps(self) -> int:
        return max(0, self._seen - self._prompt_seen) if self.decided else 0

    @property
    def has_decoded(self) -> bool:
        """Whether tokens have come behind the prompt."""
        return self._steps > 0

    @property
    def ran(self) -> Tensor:
        """[B, steps, L] boolean, the layers that each row ran at each decode step until now."""
        if (routes := self.routes) is None:
            raise ValueError("the routes are not known before the prompt has been read")
        schedule = self._rule.window(0, self._steps)
        if schedule is not None:
            return schedule.to(routes.device).expand(len(routes), -1, -1)
        if self._rule.exit_rule is not None:
            return torch.cat([routes.unsqueeze(1)[:, :0], *self._exit_record], dim=1)
        return routes.unsqueeze(1).expand(-1, self._steps, -1)

    def layer_skips(self, steps: Tensor | None = None) -> Tensor:
        """[B, L] in [0, 1], how often each layer was skipped; whether it is, for routes fixed by the prompt.

        `steps` [B] counts each row's first decode steps alone (n - 1 for a response of n tokens), as rows that have
        ended are decoded until the last one ends.
        """
        ran = self.ran
        if self.routes is not None and not self._rule.decides_each_step:
            return 1 - self.routes.float()
        place = torch.arange(ran.shape[1], device=ran.device).expand(len(ran), -1)
        counted = place >= 0 if steps is None else place < steps.to(ran.device).unsqueeze(1)
        return layer_skips(ran, counted)

    @property
    def skip_rate(self) -> Tensor:
        """[B], skipped layers ÷ L of every row, mean over its decode steps."""
        return self.layer_skips().mean(1)

    def kv_bytes(self) -> int:
        """Bytes that keys and values hold now."""
        kept = (x for layer in self.layers if layer.is_initialized for x in (layer.keys, layer.values))
        return sum(x.nbytes for x in kept)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, whether or not `layer_idx` was skipped."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, key offset) of a running layer of the same kind as `layer_idx`."""
        layer = self.layers[layer_idx]
        if hasattr(layer, "cumulative_length"):
            return layer.get_mask_sizes(query_length)
        return self._seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative count, as in transformers)."""
        seen = max(0, self._seen - abs(tokens_to_remove))
        if self._counts is not None:
            raise ValueError("tokens of a prompt that goes on cannot be taken back: start again with an empty cache")
        step = max(0, seen - self._prompt_seen)
        then, now = self._rule.window(step, 1), self._rule.window(self._steps, 1)
        if then is not None and now is not None and not torch.equal(then, now):
            raise ValueError(
                f"cannot go back from decode step {self._steps} to {step}: StepRoutes ran more layers then, and "
                "their keys and values are freed; start again from the prompt"
            )
        super().crop(tokens_to_remove)
        self._seen = seen
        if self._exit_record:
            self._exit_record = [torch.cat(self._exit_record, dim=1)[:, : self._steps]]
        self._sync_skipped_lengths()

    def reset(self) -> None:
        """Forget prompt and routes; forced routes stay."""
        super().reset()
        for layer in self.layers:
            # Older transformers only zero the states, which further tokens would be appended to.
            layer.keys = layer.values = None
            layer.is_initialized = False
        self._forget()

    # Routes go with their rows.
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._take_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take_rows(lambda rows: rows[indices.to(rows.device)])

    def _take_rows(self, take: Callable[[Tensor], Tensor]) -> None:
        for name in ("rho", "_sums", "_counts"):
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, take(rows))
        if self.routes is not None:
            self._set_routes(take(self.routes))
        if self._exit_record:
            self._exit_record = [take(torch.cat(self._exit_record, dim=1))]


def _repeated(rows: Tensor, batch: int, name: str) -> Tensor:
    """One row per row of the batch, where those of one prompt (beams) stand together."""
    if batch % len(rows):
        raise ValueError(f"{name} has {len(rows)} rows, which do not divide the batch of {batch}")
    return rows.repeat_interleave(batch // len(rows), dim=0)
