"""What `RouterAugmentedLM` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class RouterAugmentedOutput(CausalLMOutputWithPast):
    """The output of the wrapped model plus what routing adds."""

    rho: Tensor | None = None  # [B, L] fp32, with gradient in a teacher-forced pass
    # With labels always there: scalars `cross_entropy` (mean over label tokens), `regularization` (Σ ||r_i||²),
    # `non_skip` (Σ_i batch mean of rho_i), and the label `token_count`.
    loss_terms: dict[str, Tensor] = None  # type: ignore[assignment]
    token_losses: Tensor | None = None  # [B, T] fp32, of every labelled token and 0 elsewhere; with labels
    states: Tensor | None = None  # [N, D], the decoder's output where it predicts labels; with `keep_logits=False`
    ran: Tensor | None = None  # [B, T, L] boolean, the layers each token ran; teacher-forced, for forced routes
    aux_loss: Tensor | None = None  # of a mixture of experts that was asked for it, as are
    router_logits: tuple[Tensor, ...] | None = None


def known_fields(out: Any) -> dict[str, Any]:
    """What of a model's output has a place in `RouterAugmentedOutput`."""
    return {name: value for name, value in out.items() if name in RouterAugmentedOutput.__dataclass_fields__}
