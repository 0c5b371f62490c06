"""Teacher-forced passes: the paper's soft forward (§4.1) and the decode-consistent forward.

`soft` mixes every token with rho. `decode_consistent` does in one pass what inference does in many: prompt tokens run
all layers unmixed, response tokens pass through the gates that the prompt's rho sets, so that at a kept layer they
attend to the prompt's keys and values of that layer, exactly as with a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers, mix, pool, straight_through
from firstlab.model.routes import ExitPass, Routes, as_routes, decode_steps

OBJECTIVES = ("soft", "decode_consistent")
GATES = ("soft", "hard", "bernoulli")
POOLED_TOKENS = ("sequence", "prompt")


class TeacherForcedPass:
    """Routing of one forward pass over whole sequences.

    Args:
        routers: The routers.
        attention_mask: [B, T] boolean, false on padding.
        prompt_mask: [B, T] boolean, true on prompt tokens.
        objective: "soft" or "decode_consistent".
        gate: "soft" (g = rho), "hard" (g = rho >= threshold, gradient of rho) or "bernoulli" (g drawn with
            probability rho, gradient of rho).
        pooled_tokens: "sequence" (paper) or "prompt" (what inference sees); decode_consistent always pools the prompt.
        routes: Gates to use instead of the routers'. Those that change from token to token, or that the prompt follows
            too, need decode_consistent.
        exit_head: Logits of intermediate states; for `EarlyExit`.
        checkpoint_layers: Recompute each layer in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        routers: Routers | RouteRouter,
        attention_mask: Tensor,
        prompt_mask: Tensor,
        objective: str = "soft",
        gate: str = "soft",
        pooled_tokens: str = "sequence",
        routes: Routes | Tensor | None = None,
        exit_head: Callable[[Tensor], Tensor] | None = None,
        checkpoint_layers: bool = False,
    ) -> None:
        for name, value, allowed in (
            ("objective", objective, OBJECTIVES),
            ("gate", gate, GATES),
            ("pooled_tokens", pooled_tokens, POOLED_TOKENS),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")
        self.routers = routers
        self.decode_consistent = objective == "decode_consistent"
        self.gate = gate
        self.prompt_mask = prompt_mask
        self.pooled = prompt_mask if self.decode_consistent or pooled_tokens == "prompt" else attention_mask
        self._gates: Tensor | None = None
        self._exits: ExitPass | None = None
        if routes is not None:
            self._follow(as_routes(routes), objective, attention_mask, exit_head)
        self.checkpoint_layers = checkpoint_layers
        # A `RouteRouter` has decided before the pass begins.
        self._measures = isinstance(routers, Routers)
        self._rho: list[Tensor] = []

    def _follow(
        self, routes: Routes, objective: str, attention_mask: Tensor, head: Callable[[Tensor], Tensor] | None
    ) -> None:
        routes.check(self.routers.num_layers, len(attention_mask))
        if not self.decode_consistent and (routes.decides_each_step or routes.skips_prompt):
            raise ValueError(
                f"objective={objective!r} mixes prompt and response tokens alike and cannot follow "
                f"{type(routes).__name__}; use objective='decode_consistent'"
            )
        steps = decode_steps(attention_mask & ~self.prompt_mask)
        if routes.exit_rule is not None:
            assert head is not None
            self._exits = ExitPass(routes.exit_rule, head, steps, self.routers.num_layers)
        gates = routes.gates(steps)
        if gates is not None:
            gates = gates.expand(*steps.shape, -1)
            unmixed_prompt = self.decode_consistent and not routes.skips_prompt
            self._gates = gates | self.prompt_mask.unsqueeze(-1) if unmixed_prompt else gates

    @property
    def rho(self) -> Tensor:
        """[B, L], with gradient; of a `RouteRouter` the routes that are forced, as 0 and 1."""
        if not self._rho:
            assert self._gates is not None
            return self._gates.to(torch.float32).amin(1)
        return torch.stack([x.to(self._rho[0].device) for x in self._rho], dim=1)

    @property
    def ran(self) -> Tensor | None:
        """[B, T, L] boolean, the layers that each token ran under forced routes."""
        return self._gates if self._exits is None else self._exits.ran

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """Run the layer and mix its output with its input by the gate."""
        if self._measures:
            self._rho.append(self._measure(index, hidden))
        if self.checkpoint_layers and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False)
        if self._exits is not None:
            return self._exits.run_layer(index, hidden, run)
        if self._gates is not None:
            gate = self._gates[..., index].to(hidden.device, torch.float32)
        else:
            gate = self._gate(self._rho[-1])[:, None].expand(hidden.shape[:2])
            if self.decode_consistent:
                gate = torch.where(self.prompt_mask.to(hidden.device), 1.0, gate)
        output = run()
        if isinstance(output, tuple):
            return (mix(hidden, output[0], gate), *output[1:])
        return mix(hidden, output, gate)

    def _measure(self, index: int, hidden: Tensor) -> Tensor:
        return pool(self.routers.probabilities(hidden, index), self.pooled.to(hidden.device))  # type: ignore[union-attr]

    def _gate(self, rho: Tensor) -> Tensor:
        if self.gate == "hard":
            return straight_through(rho, self.routers.decide(rho))
        if self.gate == "bernoulli":
            return straight_through(rho, torch.bernoulli(rho.detach()))
        return rho


class PromptPass:
    """Measures rho on the unskipped path, as prefill does, and keeps no keys and values.

    Args:
        routers: The routers.
        prompt_mask: [B, T] boolean, true on prompt tokens.
    """

    def __init__(self, routers: Routers | RouteRouter, prompt_mask: Tensor) -> None:
        self.routers = routers
        self.prompt_mask = prompt_mask
        self._readings: list[tuple[Tensor, ...]] = []

    @property
    def means(self) -> Tensor:
        """What the routers decide by, [B, L] or [B, F]."""
        sums = self.routers.sums(self._readings, self.prompt_mask)
        return sums / self.prompt_mask.sum(1, keepdim=True).clamp_min(1).to(sums.device)

    @property
    def rho(self) -> Tensor:
        """[B, L]."""
        return self.routers.decision(self.means)[0]

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """Measure, then run the layer unchanged."""
        self._readings.append(self.routers.readings(hidden, index, self.prompt_mask))
        return run()


class ConstantPromptPass(PromptPass):
    """A `PromptPass` without any graph but that from rho to the routers, for a base that needs no gradient."""

    routers: Routers

    def __init__(self, routers: Routers, prompt_mask: Tensor) -> None:
        super().__init__(routers, prompt_mask)
        self._rho: list[Tensor] = []

    @property
    def rho(self) -> Tensor:
        """[B, L], with the routers' gradient."""
        return torch.stack([x.to(self._rho[0].device) for x in self._rho], dim=1)

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """Measure, then run the layer unchanged."""
        self._rho.append(self.routers.rho_of_constant(hidden, self.prompt_mask.to(hidden.device), index))
        return run()


class ResponsePass(TeacherForcedPass):
    """The response tokens alone, decode-consistent, behind keys and values of their prompts.

    Args:
        routers: The routers.
        rho: [B, L] of the prompts, with gradient.
        response_mask: [B, R] boolean, false on padding.
        gate, checkpoint_layers: See `TeacherForcedPass`.
        routes: One decision per prompt or for all, or None for the routers' own.
        states: Where the input of every layer is kept, [L]; None keeps nothing.
        known: So many of `states` hold already what this pass would compute: it goes on from the last of them.
    """

    def __init__(
        self,
        routers: Routers | RouteRouter,
        rho: Tensor,
        response_mask: Tensor,
        gate: str,
        checkpoint_layers: bool,
        routes: Routes | Tensor | None = None,
        states: list[Tensor | None] | None = None,
        known: int = 0,
    ) -> None:
        no_prompt = torch.zeros_like(response_mask)
        super().__init__(
            routers,
            response_mask,
            no_prompt,
            "decode_consistent",
            gate,
            routes=routes,
            checkpoint_layers=checkpoint_layers,
        )
        self._prompt_rho = rho
        self._states, self._known = states, known

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """As any pass; a layer that forced routes leave out for every row is not run at all, nor is a known one."""
        if self._states is not None:
            if index < self._known - 1:
                return self._with_state(skip(), self._states[index + 1])
            self._states[index] = hidden
        if self._gates is not None and not self._gates[..., index].any():
            if self._measures:
                self._rho.append(self._measure(index, hidden))
            return skip()
        return super().run_layer(index, hidden, run, skip)

    def _measure(self, index: int, hidden: Tensor) -> Tensor:
        return self._prompt_rho[:, index].to(hidden.device)

    @staticmethod
    def _with_state(output: Any, state: Tensor | None) -> Any:
        return (state, *output[1:]) if isinstance(output, tuple) else state
