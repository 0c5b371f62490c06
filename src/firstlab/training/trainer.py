"""One phase as one Lightning fit: callbacks, atomic checkpoints, exact resume, best weights by validation."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
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
        accumulate: Micro-batches per optimizer step.
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
        torch.save(checkpoint, temporary)
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

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.datamodule.consumed_batches = batch_idx + 1  # type: ignore[attr-defined]


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
        _CountBatches(),
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
        callbacks.append(TQDMProgressBar(refresh_rate=5))
    layer_class = type(find_decoder(module.model.lm)[1][0])
    trainer = L.Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=make_strategy(settings.strategy, layer_class),
        precision=settings.precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=settings.gradient_clip,
        val_check_interval=min(settings.validate_every, settings.max_steps) * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=loggers or False,
        use_distributed_sampler=False,
        enable_progress_bar=settings.progress_bar,
        enable_model_summary=False,
    )
    data.consumed_batches = 0
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if resume and last.is_file() else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    [final] = trainer.validate(module, datamodule=data, verbose=False)
    if best.best_model_score is not None and float(best.best_model_score) < final["val/score"]:
        checkpoint = read_checkpoint(Path(best.best_model_path))
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        [final] = trainer.validate(module, datamodule=data, verbose=False)
    return dict(final)
