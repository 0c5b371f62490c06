"""How much of what a static set breaks LoRA can repair: a few steps of phase 2 under it, taken back afterwards.

The set that hurts least without LoRA need not be the one that is best with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from firstlab.model import LoraSettings, PrunedRoutes, RouterAugmentedLM
from firstlab.training.calibration import Batch
from firstlab.training.equations import warmup_cosine


@dataclass(frozen=True)
class LoraPhase:
    """Phase 2 as far as a trial of it needs to know.

    Attributes:
        lora: The adapters.
        learning_rate, weight_decay, warmup_fraction: See `OptimizerSettings`.
        gradient_clip: Global gradient norm, or None.
        batch_size: Prompts of a step.
        seed: Of the adapters and of their dropout.
    """

    lora: LoraSettings
    learning_rate: float
    weight_decay: float
    warmup_fraction: float
    gradient_clip: float | None
    batch_size: int
    seed: int


@contextmanager
def repaired(
    model: RouterAugmentedLM, batches: Iterable[Batch], steps: int, routes: Tensor | PrunedRoutes, phase: LoraPhase
) -> Iterator[None]:
    """The model with LoRA trained under the routes; outside, the model as it was.

    Args:
        model: Without LoRA.
        batches: Teacher-forced batches with the loss on responses, one for every step.
        steps: Their number.
        routes: [L], or layers that prompts pass by as well.
        phase: How LoRA is trained.
    """
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(phase.seed)
        model.add_lora(phase.lora)
        try:
            model.freeze_all_but("lora")
            _train(model, batches, steps, routes, phase)
            model.eval()
            yield
        finally:
            model.remove_lora()
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            model.train(training)


def _train(
    model: RouterAugmentedLM, batches: Iterable[Batch], steps: int, routes: Tensor | PrunedRoutes, phase: LoraPhase
) -> None:
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=phase.learning_rate, weight_decay=phase.weight_decay)
    schedule = LambdaLR(optimizer, warmup_cosine(phase.warmup_fraction, steps))
    for batch in batches:
        out = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            prompt_mask=batch["prompt_mask"],
            objective="decode_consistent",
            routes=routes,
            keep_logits=False,
        )
        optimizer.zero_grad()
        torch.autograd.backward([out.loss_terms["cross_entropy"]])
        if phase.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(weights, phase.gradient_clip)
        optimizer.step()
        schedule.step()
