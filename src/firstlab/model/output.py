"""What `RouterAugmentedLM` returns."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class RouterAugmentedOutput(CausalLMOutputWithPast):
    """The output of the wrapped model plus what routing adds.

    Attributes:
        rho: [B, L] fp32, with gradient in a teacher-forced pass.
        loss_terms: Scalars `cross_entropy` (mean over label tokens), `regularization` (Σ ||r_i||²), `non_skip`
            (Σ_i batch mean of rho_i), and the label `token_count`; None without labels.
        token_losses: [B, T] fp32, the cross-entropy of every labelled token and 0 elsewhere; None without labels.
        states: [N, D], the decoder's output where it predicts a labelled token, row by row; only with
            `keep_logits=False`.
        ran: [B, T, L] boolean, the layers each token ran; only for forced routes, teacher-forced.
        aux_loss, router_logits: Of a mixture of experts that was asked for them.
    """

    rho: Tensor | None = None
    # ModelOutput leaves out fields that are None; with labels it is always there.
    loss_terms: dict[str, Tensor] = None  # type: ignore[assignment]
    token_losses: Tensor | None = None
    states: Tensor | None = None
    ran: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


_FIELDS = frozenset(field.name for field in fields(RouterAugmentedOutput))


def known_fields(out: Any) -> dict[str, Any]:
    """What of a model's output has a place in `RouterAugmentedOutput`."""
    return {name: value for name, value in out.items() if name in _FIELDS}
