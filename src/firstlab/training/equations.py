"""The losses of the paper (§4.1, §4.2), where α and β enter, and the controller of the skip rate: pure functions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def router_loss(cross_entropy: Tensor, regularization: Tensor, non_skip: Tensor, *, lam: float, alpha: float) -> Tensor:
    """Phase 1 (§4.1): L = L_CE + λ · Σ_i ||r_i||² + α · Σ_i rho_i, λ = 0.01 in the paper.

    Args:
        cross_entropy: Mean over label tokens.
        regularization: Σ over layers of the squared router norm.
        non_skip: Σ over layers of the batch mean of rho.
        lam, alpha: λ and α, which trades quality for latency.
    """
    return cross_entropy + lam * regularization + alpha * non_skip


def lora_loss(cross_entropy: Tensor, non_skip: Tensor, *, beta: float) -> Tensor:
    """Phase 2 (§4.2): L = L_CE(response) + β · Σ_i rho_i, β = α / 3 in the paper (A.4)."""
    return cross_entropy + beta * non_skip


def distillation_losses(student: Tensor, teacher: Tensor) -> Tensor:
    """[N] KL(teacher || student) of every token, in nats and fp32, from logits [N, V]."""
    log_student, log_teacher = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)


def dual_step(multiplier: float, skip_rate: float, *, target: float, rate: float) -> float:
    """One step of dual ascent on the measured hard skip rate: too little skipping raises the price of running layers.

    The multiplier may become negative, which pays for running layers when too many are skipped.
    """
    return multiplier + rate * (target - skip_rate)


def selection_score(
    cross_entropy: float, skip_rate: float, *, target: float | None, tolerance: float, weight: float
) -> float:
    """What "best by validation" means at a target skip rate: cross-entropy of the routed model plus `weight` times the
    distance to the target beyond `tolerance`. Without a target it is the cross-entropy alone.
    """
    if target is None:
        return cross_entropy
    return cross_entropy + weight * max(0.0, abs(skip_rate - target) - tolerance)
