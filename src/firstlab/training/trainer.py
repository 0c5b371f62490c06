"""One phase as one Lightning fit: callbacks, atomic checkpoints, exact resume, best weights by validation."""

from __future__ import annotations

import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from firstlab.data.datamodule import PromptDataModule
from firstlab.model.layers import find_decoder
from firstlab.training.modules import LoRACompensationModule, RouterModule


@dataclass(frozen=True)
class FitSettings:
    """How one phase is run.

    Attributes:
        accelerator, devices, num_nodes, strategy, precision: As for Lightning's Trainer; strategy auto, ddp or fsdp.
        accumulate: Micro-batches per optimizer step; their mean losses weigh alike.
        max_steps: Optimizer steps.
        gradient_clip: Global gradient norm, or None.
        validate_every, checkpoint_every: In optimizer steps.
        patience: Validations without improvement before stopping, or None.
        progress_bar: Show progress.
    """

    accelerator: str
    devices: int
    num_nodes: int
    strategy: str
    precision: str
    accumulate: int
    max_steps: int
    gradient_clip: float | None
    validate_every: int
    checkpoint_every: int
    patience: int | None
    progress_bar: bool


class AtomicCheckpointIO(TorchCheckpointIO):
    """Renames finished files into place, so that a checkpoint is whole or absent; reads tensors and plain data only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as opened:  # by its path, torch would hide why it could not be written
            torch.save(checkpoint, opened)
        os.replace(temporary, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU.

    Raises:
        ValueError: It is truncated or not a checkpoint.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated or not a checkpoint ({type(error).__name__}); "
            "delete it, or pass ckpt=none to start the phase again"
        ) from error


class _CountBatches(Callback):
    """Tells the data module where an interrupted run goes on. Lightning runs it before any ModelCheckpoint."""

    def __init__(self, data: PromptDataModule) -> None:
        self.data = data

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.data.consumed_batches = batch_idx + 1


class _ProgressBar(TQDMProgressBar):
    """One bar per phase, named after it; validation shows in its figures only."""

    def __init__(self, title: str) -> None:
        super().__init__(refresh_rate=5)
        self.title = title

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(self.title)


def make_strategy(name: str, layer_class: type[torch.nn.Module]) -> Strategy | str:
    """Lightning strategy; fsdp wraps decoder layers."""
    if name == "ddp":
        # Buffers are constants here, and ranks may validate different numbers of batches.
        return DDPStrategy(broadcast_buffers=False)
    if name == "fsdp":
        return FSDPStrategy(auto_wrap_policy={layer_class}, use_orig_params=True, state_dict_type="full")
    return "auto"


def fit_phase(
    module: RouterModule | LoRACompensationModule,
    data: PromptDataModule,
    settings: FitSettings,
    directory: Path,
    loggers: list[Logger],
    resume: bool,
) -> dict[str, float]:
    """Train, resuming from `directory/last.ckpt` if there is one, and leave the best weights in the module.

    Args:
        module: The phase.
        data: Its loaders make the whole run one epoch.
        settings: See `FitSettings`.
        directory: For last.ckpt and best.ckpt.
        loggers: Lightning loggers.
        resume: Whether to go on from last.ckpt.

    Returns:
        Validation figures of the weights kept.
    """
    last = directory / "last.ckpt"
    best = ModelCheckpoint(
        directory,
        filename="best",
        monitor="val_score",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    callbacks: list[Callback] = [
        _CountBatches(data),
        best,
        ModelCheckpoint(
            directory,
            filename="last",
            every_n_train_steps=settings.checkpoint_every,
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        ),
    ]
    if settings.patience is not None:
        callbacks.append(EarlyStopping("val_score", patience=settings.patience, check_on_train_epoch_end=False))
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    if settings.progress_bar:
        callbacks.append(_ProgressBar(f"train {' and '.join(module.trainable)}"))
    layer_class = type(find_decoder(module.model.lm)[1][0])
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning would requeue the job itself, from a checkpoint that it also puts in place of what we validate.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = L.Trainer(
        default_root_dir=directory,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=make_strategy(settings.strategy, layer_class),
        precision=cast(Any, settings.precision),  # Lightning checks it; its name for the type is private
        max_epochs=1,
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip,
        val_check_interval=min(settings.validate_every, settings.max_steps) * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        plugins=plugins,
        logger=loggers or False,
        use_distributed_sampler=False,
        enable_progress_bar=settings.progress_bar,
        enable_model_summary=False,
    )
    data.start_over()
    # The start competes with what training makes of it: a calibrated router may not be worth changing.
    start = {k: v.detach().cpu().clone() for k, v in module.state_dict().items() if k in _trainable(module)}
    [before] = trainer.validate(module, datamodule=data, verbose=False)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if resume and last.is_file() else None)
    except SystemExit:
        # Lightning ends the process on Ctrl-C; our caller says how to go on.
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    if settings.strategy == "fsdp":
        # The module holds shards; the best checkpoint holds everything.
        checkpoint = read_checkpoint(Path(best.best_model_path))
        module.multiplier = checkpoint["multiplier"]
        return {"val/score": float(checkpoint["val_score"])}
    [final] = trainer.validate(module, datamodule=data, verbose=False)
    start_score, best_score = _finite(before["val/score"]), _finite(best.best_model_score)
    kept_score = min(start_score, best_score)
    if not final["val/score"] <= kept_score < math.inf:  # training that diverges ends at NaN
        kept = Path(best.best_model_path)
        weights = start if start_score == kept_score else read_checkpoint(kept)["state_dict"]
        module.load_state_dict(weights, strict=False)
        [final] = trainer.validate(module, datamodule=data, verbose=False)
    return {**final, "start/score": before["val/score"]}


def _finite(score: Any) -> float:
    """A score to be compared: one that is missing or not a number is as bad as can be."""
    return math.inf if score is None or not math.isfinite(score) else float(score)


def _trainable(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
