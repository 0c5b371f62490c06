"""The two training phases as LightningModules that share one `RouterAugmentedLM`.

Phase 1 trains the routers and nothing else; phase 2 trains LoRA under the frozen routers (§4.1, §4.2).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from firstlab.methods.base import rows_of
from firstlab.methods.objective import RoutingObjective
from firstlab.model import RouterAugmentedLM, RouterAugmentedOutput, Routes, layer_skips
from firstlab.model.loss import in_chunks
from firstlab.training.equations import distillation_losses, dual_step, lora_loss, router_loss, selection_score


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay to zero.

    Attributes:
        learning_rate: Peak.
        weight_decay: Decoupled.
        warmup_fraction: Share of the optimizer steps.
        total_steps: Optimizer steps of the whole phase.
        router_learning_rate: Peak for the routers where they are trained beside LoRA; None takes `learning_rate`.
    """

    learning_rate: float
    weight_decay: float
    warmup_fraction: float
    total_steps: int
    router_learning_rate: float | None = None


# Price of a missed skip target in the selection score: 0.1 nats for every percent beyond the tolerance.
_TARGET_WEIGHT = 10.0


class _Phase(L.LightningModule):
    """What both phases share: loss normalisation over ranks, dual ascent, validation, optimizer, lean checkpoints."""

    trainable: tuple[str, ...]

    def __init__(
        self,
        model: RouterAugmentedLM,
        objective: RoutingObjective,
        optimizer: OptimizerSettings,
        seed: int,
        routes: Routes | None = None,
        val_routes: Routes | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.optimizer_settings = optimizer
        self.seed = seed
        self.multiplier = objective.multiplier
        self.score = math.inf
        # A method's routes of training and validation prompts; None lets the routers decide.
        self.routes, self.val_routes = routes, val_routes
        # Checkpoints hold the trainable weights only.
        self.strict_loading = False
        self._skip_rates: list[Tensor] = []
        self._validation: dict[str, Tensor] = {}
        model.freeze_all_but(*self.trainable)

    @abstractmethod
    def loss(self, cross_entropy: Tensor, non_skip: Tensor) -> Tensor:
        """The phase's objective from globally normalised terms."""

    # -- training --

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Dropout and sampled gates depend on the step alone, so that a resumed run repeats an uninterrupted one.
        torch.manual_seed((self.seed * 1_000_003 + batch_idx) * self.trainer.world_size + self.global_rank)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        routes = rows_of(self.routes, batch["index"].tolist(), self.device)
        out = self._routed(batch, routes)
        # Every rank holds its share of the global batch; sums over it must not depend on how it was cut.
        terms = out.loss_terms
        cross_entropy = self._global_mean(terms["cross_entropy"], terms["token_count"])
        fit = cross_entropy
        if self.objective.distill > 0:
            divergence = self._global_mean(self._divergence(out, batch), terms["token_count"])
            self.log("train/divergence", divergence.detach(), sync_dist=True)
            fit = cross_entropy + self.objective.distill * divergence
        rows = torch.tensor(len(batch["input_ids"]), device=self.device)
        non_skip = self._global_mean(terms["non_skip"], rows)
        loss = self.loss(fit, non_skip)
        if self.objective.hold_routes > 0 and routes is None:
            drift = self._global_mean(self._drift(out, batch), rows)
            self.log("train/drift", drift.detach(), sync_dist=True)
            loss = loss + self.objective.hold_routes * drift
        skip_rate = self._hard_skip_rate(out, batch, routes)
        if self.objective.target_skip is not None:
            self._skip_rates.append(self._global_mean(skip_rate, rows))
        self.log("train/loss", loss.detach(), sync_dist=True)
        # In the progress bar: the loss with its driven penalty can fall, below zero even, while the fit gets worse.
        self.log("train/cross_entropy", cross_entropy.detach(), prog_bar=True, sync_dist=True)
        self.log("train/skip_rate", skip_rate, prog_bar=True, sync_dist=True)
        self.log("train/multiplier", self.multiplier, rank_zero_only=True)
        return loss

    def _routed(self, batch: dict[str, Tensor], routes: Routes | None) -> RouterAugmentedOutput:
        return self.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["labels"],
            prompt_mask=batch["prompt_mask"],
            objective=self.objective.objective,
            gate=self.objective.gate,
            pooled_tokens=self.objective.pooled_tokens,
            routes=routes,
            keep_logits=False,
        )

    def _divergence(self, out: RouterAugmentedOutput, batch: dict[str, Tensor]) -> Tensor:
        """How far the routed model's predictions of the label tokens are from those of the dense base model."""
        dense = self.model.dense_states(batch["input_ids"], batch["attention_mask"], batch["labels"])
        head = self.model.output_head()
        assert out.states is not None

        def losses(student: Tensor, teacher: Tensor) -> Tensor:
            return distillation_losses(head(student), head(teacher))

        return in_chunks(losses, self.model.loss_chunk, out.states, dense).sum() / max(1, len(dense))

    def _drift(self, out: RouterAugmentedOutput, batch: dict[str, Tensor]) -> Tensor:
        """How far LoRA moved what the frozen routers read in the prompts, by the rho that they had without it."""
        with self.model.lora_disabled():
            before = self.model.prompt_rho(batch["input_ids"], batch["prompt_mask"])
        assert out.rho is not None
        return (out.rho - before).square().sum(1).mean()

    def _global_mean(self, local_mean: Tensor, local_weight: Tensor) -> Tensor:
        """The rank's share of a weighted mean over all ranks, scaled so that averaging over ranks gives that mean."""
        world = self.trainer.world_size
        if world == 1:
            return local_mean
        total = self.trainer.strategy.reduce(local_weight.float(), reduce_op="sum")
        return local_mean * (local_weight * world / total)

    def _hard_skip_rate(self, out: RouterAugmentedOutput, batch: dict[str, Tensor], routes: Routes | None) -> Tensor:
        if routes is not None:
            return _step_skips(out, batch).mean()
        rho = out.rho
        if self.objective.objective != "decode_consistent" and self.objective.target_skip is not None:
            # The soft pass mixes the prompt too; inference measures rho on the unskipped prompt.
            rho = self.model.prompt_rho(batch["input_ids"], batch["prompt_mask"])
        assert rho is not None
        return 1 - self.model.routers.decide(rho.detach()).float().mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        target = self.objective.target_skip
        if target is None:
            return
        # Mean over the accumulated micro-batches, the same on every rank.
        measured = float(self.trainer.strategy.reduce(torch.stack(self._skip_rates).mean(), reduce_op="mean"))
        self.multiplier = dual_step(self.multiplier, measured, target, self.objective.dual_rate)
        self._skip_rates.clear()

    # -- validation: the routed model as inference runs it --

    def on_validation_epoch_start(self) -> None:
        self._validation = {
            name: torch.zeros(size, device=self.device)
            for name, size in (
                ("nll", 1),
                ("tokens", 1),
                ("rows", 1),
                ("rho", self.model.num_layers),
                ("skip", self.model.num_layers),
                ("soft", 1),
            )
        }

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        common = {k: batch[k] for k in ("input_ids", "attention_mask", "prompt_mask")}
        response = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
        routes = rows_of(self.val_routes, batch["index"].tolist(), self.device)
        out = self.model(
            **common,
            labels=response,
            objective="decode_consistent",
            gate="hard",
            routes=routes,
            keep_logits=False,
        )
        sums = self._validation
        rows = len(batch["input_ids"])
        tokens = out.loss_terms["token_count"]
        if routes is None:
            skips = (~self.model.routers.decide(out.rho)).float()
        else:
            skips = (~routes.expand(rows, -1)).float() if isinstance(routes, Tensor) else _step_skips(out, batch)
        sums["nll"] += out.loss * tokens
        sums["tokens"] += tokens
        sums["rows"] += rows
        sums["rho"] += out.rho.sum(0)
        sums["skip"] += skips.sum(0)
        if self.objective.target_skip is None and routes is None:
            training = self._routed(batch, None).loss_terms
            sums["soft"] += rows * self.loss(training["cross_entropy"], training["non_skip"])

    def on_validation_epoch_end(self) -> None:
        sums = {name: self.trainer.strategy.reduce(x, reduce_op="sum") for name, x in self._validation.items()}
        rho, skip = sums["rho"] / sums["rows"], sums["skip"] / sums["rows"]
        cross_entropy, skip_rate = float(sums["nll"] / sums["tokens"]), float(skip.mean())
        if self.objective.target_skip is None and self.routes is None:
            # The paper stops on its own training loss (A.4).
            score = float(sums["soft"] / sums["rows"])
        else:
            score = selection_score(
                cross_entropy, skip_rate, self.objective.target_skip, self.objective.tolerance, _TARGET_WEIGHT
            )
        self.score = score
        values = {"val/score": score, "val/cross_entropy": cross_entropy, "val/skip_rate": skip_rate}
        for index in range(self.model.num_layers):
            values[f"rho/layer{index:02d}"] = float(rho[index])
            values[f"skip/layer{index:02d}"] = float(skip[index])
        # Already reduced: the same number on every rank.
        self.log_dict(values, rank_zero_only=False, sync_dist=False)
        self.log("val_score", score, prog_bar=True, logger=False)

    # -- optimizer and checkpoints --

    def configure_optimizers(self) -> Any:
        settings = self.optimizer_settings
        routers = {id(p) for p in self.model.routers.parameters()}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in routers]
        rate = settings.learning_rate if settings.router_learning_rate is None else settings.router_learning_rate
        groups = [
            {"params": [p for p in self.model.routers.parameters() if p.requires_grad], "lr": rate},
            {"params": others, "lr": settings.learning_rate},
        ]
        optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=rate, weight_decay=settings.weight_decay
        )
        warmup = max(1, round(settings.warmup_fraction * settings.total_steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, settings.total_steps - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        named = ((name.replace("_fsdp_wrapped_module.", ""), p) for name, p in self.named_parameters())
        trainable = {name for name, p in named if p.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint["multiplier"] = self.multiplier
        checkpoint["val_score"] = self.score

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.multiplier = checkpoint["multiplier"]


class RouterModule(_Phase):
    """Phase 1: routers only (§4.1)."""

    trainable: tuple[str, ...] = ("routers",)

    def loss(self, cross_entropy: Tensor, non_skip: Tensor) -> Tensor:
        """CE + λ Σ||r||² + α Σ rho."""
        return router_loss(
            cross_entropy, self.model.routers.squared_norm(), non_skip, self.objective.lam, self.multiplier
        )


class LoRACompensationModule(_Phase):
    """Phase 2: LoRA under frozen routers (§4.2)."""

    trainable = ("lora",)

    def loss(self, cross_entropy: Tensor, non_skip: Tensor) -> Tensor:
        """CE(response) + β Σ rho."""
        if self.routes is not None:
            return cross_entropy
        return lora_loss(cross_entropy, non_skip, self.multiplier)


class OnePhaseModule(RouterModule):
    """Routers and LoRA trained together under the loss of phase 1: what two phases are compared with."""

    trainable = ("routers", "lora")


def _step_skips(out: RouterAugmentedOutput, batch: dict[str, Tensor]) -> Tensor:
    """[B, L], how often the response's tokens skipped each layer under forced routes."""
    assert out.ran is not None
    return layer_skips(out.ran, batch["attention_mask"].bool() & ~batch["prompt_mask"].bool())
