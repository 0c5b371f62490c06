"""Teacher-forced passes: the paper's soft forward (§4.1) and the decode-consistent forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers, mix, pool, straight_through
from firstlab.model.routes import ExitPass, Routes, as_routes, decode_steps, with_state
from firstlab.model.settings import check_choice

OBJECTIVES = ("soft", "decode_consistent")
GATES = ("soft", "hard", "bernoulli")
POOLED_TOKENS = ("sequence", "prompt")


@dataclass(eq=False)
class PromptPass:
    """Measures on the unskipped path, as prefill does, what the routers decide by."""

    routers: Routers | RouteRouter
    prompt_mask: Tensor  # [B, T] boolean, true on prompt tokens
    constant: bool = False  # hidden states without a gradient: no graph but that from rho to the per-layer routers

    def __post_init__(self) -> None:
        self._readings: list[tuple[Tensor, ...]] = []
        self._rho: list[Tensor] = []

    @property
    def means(self) -> Tensor:
        """What the routers decide by, [B, L] or [B, F]."""
        sums = self.routers.sums(self._readings, self.prompt_mask)
        return sums / self.prompt_mask.sum(1, keepdim=True).clamp_min(1).to(sums.device)

    @property
    def rho(self) -> Tensor:
        """[B, L], with the routers' gradient where `constant`."""
        return _side_by_side(self._rho) if self._rho else self.routers.decision(self.means)[0]

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        if self.constant:
            assert isinstance(self.routers, Routers)
            self._rho.append(self.routers.rho_of_constant(hidden, self.prompt_mask.to(hidden.device), index))
        else:
            self._readings.append(self.routers.readings(hidden, index, self.prompt_mask))
        return run()


@dataclass(eq=False)
class TeacherForcedPass:
    """Routing of one forward pass over whole sequences.

    The objective "soft" mixes every token with rho. "decode_consistent" does in one pass what inference does in many:
    prompt tokens run all layers unmixed, and response tokens pass through the gates that the prompt's rho sets, so that
    at a kept layer they attend to the prompt's keys and values, exactly as with a KV cache.
    """

    routers: Routers | RouteRouter
    attention_mask: Tensor  # [B, T] boolean, false on padding
    prompt_mask: Tensor  # [B, T] boolean, true on prompt tokens
    objective: str = "soft"
    # "soft" (g = rho), "hard" (g = rho >= threshold) or "bernoulli" (drawn with probability rho), with rho's gradient.
    gate: str = "soft"
    pooled_tokens: str = "sequence"  # (paper) or "prompt" (what inference sees, and decode_consistent always)
    # Used instead of the routers' gates. Routes that change from token to token, or that the prompt follows too, need
    # decode_consistent.
    routes: Routes | Tensor | None = None
    exit_head: Callable[[Tensor], Tensor] | None = None  # logits of intermediate states; for `EarlyExit`
    checkpoint_layers: bool = False  # recompute each layer in the backward pass instead of keeping its activations
    prompt_rho: Tensor | None = None  # [B, L] of prompts that were read before: the tokens are their responses alone
    states: list[Tensor | None] | None = None  # [L], each layer's input, to be shared with a pass under other routes
    known: int = 0  # so many of `states` are already what this pass would compute: it goes on from the last of them

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("gate", self.gate, GATES)
        check_choice("pooled_tokens", self.pooled_tokens, POOLED_TOKENS)
        self.decode_consistent = self.objective == "decode_consistent"
        pools_prompt = self.decode_consistent or self.pooled_tokens == "prompt"
        self._pooled = self.prompt_mask if pools_prompt else self.attention_mask
        self._rho: list[Tensor] = []
        self._gates: Tensor | None = None
        self._exits: ExitPass | None = None
        if self.routes is not None:
            self._follow(as_routes(self.routes))

    def _follow(self, routes: Routes) -> None:
        routes.check(self.routers.num_layers, len(self.attention_mask))
        if not self.decode_consistent and (routes.decides_each_step or routes.skips_prompt):
            raise ValueError(
                f"objective={self.objective!r} mixes prompt and response tokens alike and cannot follow "
                f"{type(routes).__name__}; use objective='decode_consistent'"
            )
        steps = decode_steps(self.attention_mask & ~self.prompt_mask)
        if routes.exit_rule is not None:
            assert self.exit_head is not None
            self._exits = ExitPass(routes.exit_rule, self.exit_head, steps, self.routers.num_layers)
        if (gates := routes.gates(steps)) is not None:
            gates = gates.expand(*steps.shape, -1)
            unmixed_prompt = self.decode_consistent and not routes.skips_prompt
            self._gates = gates | self.prompt_mask.unsqueeze(-1) if unmixed_prompt else gates

    @property
    def rho(self) -> Tensor:
        """[B, L], with gradient; of a `RouteRouter`, which decides before the pass, its routes as 0 and 1."""
        if self._rho:
            return _side_by_side(self._rho)
        assert self._gates is not None
        return self._gates.to(torch.float32).amin(1)

    @property
    def ran(self) -> Tensor | None:
        """[B, T, L] boolean, the layers that each token ran under forced routes."""
        return self._gates if self._exits is None else self._exits.ran

    def run_layer(self, index: int, hidden: Tensor, run: Callable[[], Any], skip: Callable[[], Any]) -> Any:
        """Run the layer and mix its output with its input by the gate."""
        if self.states is not None:
            if index < self.known - 1:
                state = self.states[index + 1]
                assert state is not None
                return with_state(skip(), state)
            self.states[index] = hidden
        if self.prompt_rho is not None:
            self._rho.append(self.prompt_rho[:, index].to(hidden.device))
            if self._gates is not None and not self._gates[..., index].any():
                return skip()  # forced routes leave it out for every row
        elif isinstance(self.routers, Routers):
            self._rho.append(pool(self.routers.probabilities(hidden, index), self._pooled.to(hidden.device)))
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
        return with_state(output, mix(hidden, output[0] if isinstance(output, tuple) else output, gate))

    def _gate(self, rho: Tensor) -> Tensor:
        if self.gate == "hard":
            return straight_through(rho, self.routers.decide(rho))
        if self.gate == "bernoulli":
            return straight_through(rho, torch.bernoulli(rho.detach()))
        return rho


def _side_by_side(columns: list[Tensor]) -> Tensor:
    return torch.stack([x.to(columns[0].device) for x in columns], dim=1)
