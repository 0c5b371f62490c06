"""The two training phases as LightningModules: phase 1 trains the routers alone, phase 2 LoRA under frozen routers.

The losses themselves are in `equations`; checkpoints and the choice of the best weights are in `trainer`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from firstlab.config.schema import PhaseConfig
from firstlab.data.room import Room
from firstlab.methods.base import rows_of
from firstlab.methods.objective import RoutingObjective
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.loss import in_chunks
from firstlab.model.output import RouterAugmentedOutput
from firstlab.model.routes import Routes, layer_skips
from firstlab.training.equations import distillation_losses, dual_step, lora_loss, router_loss, selection_score
from firstlab.training.sharding import ShardedBase, shard_base

# Price of a missed skip target in the selection score: 0.1 nats for every percent beyond the tolerance.
_TARGET_WEIGHT = 10.0


class Phase(L.LightningModule):
    """Train part of a model: loss normalisation over ranks, dual ascent, validation, optimizer, lean checkpoints."""

    trainable: tuple[str, ...]

    def __init__(
        self,
        model: RouterAugmentedLM,
        *,
        objective: RoutingObjective,
        phase: PhaseConfig,
        seed: int,
        router_learning_rate: float | None = None,
        routes: Routes | None = None,
        val_routes: Routes | None = None,
        held_rho: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.phase, self.seed = model, objective, phase, seed
        self.router_learning_rate = phase.learning_rate if router_learning_rate is None else router_learning_rate
        self.multiplier = objective.multiplier
        self.score = math.inf
        # The first step whose loss was not finite. A tensor, so that no step waits for the device.
        self._broken_at = torch.tensor(math.inf)
        # A method's routes of training and validation prompts; None lets the routers decide.
        self.routes, self.val_routes = routes, val_routes
        # [N, L] rho of the training prompts without LoRA, if they were read before; see `_drift`.
        self.held_rho = held_rho
        # Checkpoints hold the trainable weights only.
        self.strict_loading = False
        self._skip_rates: list[Tensor] = []
        self._validation: dict[str, Tensor] = {}
        self._room = Room()
        model.freeze_all_but(*self.trainable)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ShardedBase):
            assert self.device_mesh is not None
            shard_base(self.model, self.device_mesh["data_parallel"])

    @abstractmethod
    def loss(self, cross_entropy: Tensor, non_skip: Tensor) -> Tensor:
        """What the phase minimises, from globally normalised terms."""

    def cpu(self) -> Phase:  # type: ignore[override]
        """Stay: Lightning would move all weights to the host behind every fit and validation, and back before them."""
        return self

    # -- training --

    def transfer_batch_to_device(self, batch: dict[str, Tensor], device: torch.device, _: int) -> dict[str, Tensor]:
        # The rest says which tokens count, which is asked on the host without a wait for the device.
        return batch | {"input_ids": batch["input_ids"].to(device, non_blocking=True)}

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
        if self.phase.distill > 0:
            divergence = self._global_mean(self._divergence(out, batch), terms["token_count"])
            self.log("train/divergence", divergence.detach(), sync_dist=True)
            fit = cross_entropy + self.phase.distill * divergence
        rows = torch.full((), len(batch["input_ids"]), device=self.device)
        non_skip = self._global_mean(terms["non_skip"], rows)
        loss = self.loss(fit, non_skip)
        if self.objective.hold_routes > 0 and routes is None:
            drift = self._global_mean(self._drift(out, batch), rows)
            self.log("train/drift", drift.detach(), sync_dist=True)
            loss = loss + self.objective.hold_routes * drift
        skip_rate = self._hard_skip_rate(out, batch, routes)
        if self.objective.target_skip is not None:
            self._skip_rates.append(self._global_mean(skip_rate, rows))
        broken = torch.where(loss.detach().isfinite(), math.inf, self.trainer.global_step + 1.0)
        self._broken_at = torch.minimum(self._broken_at.to(broken.device), broken)
        self.log("train/loss", loss.detach(), sync_dist=True)
        # The progress bar shows the fit: the loss with its driven penalty can fall while the fit gets worse.
        self.log("train/cross_entropy", cross_entropy.detach(), prog_bar=True, sync_dist=True)
        self.log("train/skip_rate", skip_rate, prog_bar=True, sync_dist=True)
        # Of a number Lightning makes a tensor that the host waits for.
        self.log("train/multiplier", torch.full((), self.multiplier, device=self.device), rank_zero_only=True)
        return loss

    def _routed(self, batch: dict[str, Tensor], routes: Routes | None, **changed: Any) -> RouterAugmentedOutput:
        given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels", "prompt_mask")}
        given |= {name: getattr(self.objective, name) for name in ("objective", "gate", "pooled_tokens")}
        return self.model(**given | changed, routes=routes, keep_logits=False)

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
        if self.held_rho is None:
            with self.model.lora_disabled():
                before = self.model.prompt_rho(batch["input_ids"], batch["prompt_mask"])
        else:
            # Lightning's DDP moves whole batches to the device.
            before = self.held_rho[batch["index"].cpu()].to(self.device, non_blocking=True)
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
        self.multiplier = dual_step(self.multiplier, measured, target=target, rate=self.objective.dual_rate)
        self._skip_rates.clear()

    # -- validation: the routed model as inference runs it --

    def on_validation_epoch_start(self) -> None:
        torch.manual_seed(self.seed * self.trainer.world_size + self.global_rank)  # sampled gates, after a resume too
        layers = self.model.num_layers
        sizes = {"nll": 1, "tokens": 1, "rows": 1, "rho": layers, "skip": layers, "soft": 1}
        self._validation = {name: torch.zeros(size, device=self.device) for name, size in sizes.items()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        def measure(rows: Sequence[int]) -> dict[str, Tensor]:
            return self._measured({name: values[rows[0] : rows[-1] + 1] for name, values in batch.items()})

        # The mean of the training loss depends on the batch; processes that share a base must take the same passes.
        whole = self.reads_training_loss or isinstance(self.trainer.strategy, ShardedBase)
        rows = range(len(batch["input_ids"]))
        for found in [measure(rows)] if whole else self._room.passes(rows, measure):
            for name, value in found.items():
                self._validation[name] += value

    @property
    def reads_training_loss(self) -> bool:
        """Whether validation also takes the loss of training, on which the paper stops (A.4)."""
        return self.objective.target_skip is None and self.routes is None

    def _measured(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What validation sums up over batches."""
        response = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
        routes = rows_of(self.val_routes, batch["index"].tolist(), self.device)
        out = self._routed(batch, routes, labels=response, objective="decode_consistent", gate="hard")
        assert out.loss is not None and out.rho is not None
        rows, tokens = torch.tensor(len(batch["input_ids"])), out.loss_terms["token_count"]
        skips = (~self.model.routers.decide(out.rho)).float() if routes is None else _step_skips(out, batch)
        found = {"nll": out.loss * tokens, "tokens": tokens, "rows": rows}
        found |= {"rho": out.rho.sum(0), "skip": skips.sum(0)}
        if self.reads_training_loss:
            training = self._routed(batch, None).loss_terms
            found["soft"] = rows * self.loss(training["cross_entropy"], training["non_skip"])
        return found

    def on_validation_epoch_end(self) -> None:
        sums = {name: self.trainer.strategy.reduce(x, reduce_op="sum") for name, x in self._validation.items()}
        skips = sums["skip"] / sums["rows"]
        rho, skip = torch.stack([sums["rho"] / sums["rows"], skips]).tolist()
        cross_entropy, skip_rate = float(sums["nll"] / sums["tokens"]), float(skips.mean())
        if self.reads_training_loss:
            score = float(sums["soft"] / sums["rows"])
        else:
            target, tolerance = self.objective.target_skip, self.objective.tolerance
            score = selection_score(cross_entropy, skip_rate, target=target, tolerance=tolerance, weight=_TARGET_WEIGHT)
        self.score = score
        broken = torch.full_like(sums["rows"][0], math.inf if math.isfinite(score) else self.trainer.global_step)
        self._broken_at = self.trainer.strategy.reduce(
            torch.minimum(self._broken_at.to(broken.device), broken), reduce_op="min"
        )
        values = {"val/cross_entropy": cross_entropy, "val/skip_rate": skip_rate}
        for index in range(self.model.num_layers):
            values[f"rho/layer{index:02d}"], values[f"skip/layer{index:02d}"] = rho[index], skip[index]
        # The same number on every rank already, which the greatest of them is, exactly.
        self.log_dict(values, reduce_fx="max", sync_dist=True)
        self.log("val/score", score, prog_bar=True, reduce_fx="max", sync_dist=True)

    @property
    def broken_at(self) -> int | None:
        """The first step whose loss, in training or in the validation behind it, was not finite."""
        step = float(self._broken_at)
        return int(step) if math.isfinite(step) else None

    # -- optimizer and checkpoints --

    def configure_optimizers(self) -> Any:
        routers = [p for p in self.model.routers.parameters() if p.requires_grad]
        known = set(map(id, routers))
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        rate, total = self.phase.learning_rate, self.trainer.max_steps
        groups = [{"params": routers, "lr": self.router_learning_rate}, {"params": others, "lr": rate}]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=self.phase.weight_decay)
        warmup = max(1, round(self.phase.warmup_fraction * total))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, total - warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def trainable_weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of a state dict that this phase trains; all that its checkpoints hold."""
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: value for name, value in state.items() if name in trainable}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trainable_weights(checkpoint["state_dict"])
        checkpoint["multiplier"] = self.multiplier
        checkpoint["broken_at"] = self._broken_at.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.multiplier, self._broken_at = checkpoint["multiplier"], checkpoint["broken_at"]


class RouterModule(Phase):
    """Phase 1: routers only (§4.1)."""

    trainable: tuple[str, ...] = ("routers",)

    def loss(self, cross_entropy: Tensor, non_skip: Tensor) -> Tensor:
        """CE + λ Σ||r||² + α Σ rho; `multiplier` is α."""
        norms = self.model.routers.squared_norm()
        return router_loss(cross_entropy, norms, non_skip, lam=self.objective.lam, alpha=self.multiplier)


class LoRACompensationModule(Phase):
    """Phase 2: LoRA under frozen routers (§4.2)."""

    trainable = ("lora",)

    def loss(self, cross_entropy: Tensor, non_skip: Tensor) -> Tensor:
        """CE(response) + β Σ rho, `multiplier` is β; where a method has decided the routes, CE alone."""
        return cross_entropy if self.routes is not None else lora_loss(cross_entropy, non_skip, beta=self.multiplier)


class OnePhaseModule(RouterModule):
    """Routers and LoRA trained together under the loss of phase 1: what two phases are compared with."""

    trainable = ("routers", "lora")


def _step_skips(out: RouterAugmentedOutput, batch: dict[str, Tensor]) -> Tensor:
    """[B, L], how often the response's tokens skipped each layer under forced routes."""
    assert out.ran is not None
    response = batch["attention_mask"].bool() & ~batch["prompt_mask"].bool()
    return layer_skips(out.ran, response.to(out.ran.device, non_blocking=True))
