"""Run one phase as one Lightning fit: atomic checkpoints, exact resume, the best weights by validation."""

from __future__ import annotations

import math
import os
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from firstlab.config.schema import PhaseConfig, TrainerConfig
from firstlab.data.datamodule import PromptDataModule
from firstlab.model.layers import compiled, find_decoder
from firstlab.training.modules import Phase
from firstlab.training.sharding import ShardedBase, SharedGradients

LAST = "last.ckpt"


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
        checkpoint = read_checkpoint(Path(path))
        if not isinstance(checkpoint, dict) or "broken_at" not in checkpoint:
            raise ValueError(
                f"{path} is of another program or version: delete it, or pass ckpt=none to start the phase again"
            )
        return checkpoint


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU; a ValueError if it is truncated or no checkpoint."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError) as error:
        raise ValueError(
            f"{file} is truncated or not a checkpoint ({type(error).__name__}); "
            "delete it, or pass ckpt=none to start the phase again"
        ) from error


class _Progress(Callback):
    """Everything that a resumed run must know, in one file that is written last at a step.

    At a step, training comes first, then validation where it is due, then last.ckpt with the best weights so far and
    the patience left: whenever the run is killed, it goes on behind a step that was finished.
    """

    def __init__(self, data: PromptDataModule, phase: PhaseConfig, max_steps: int, directory: Path) -> None:
        self.data, self.phase, self.max_steps, self.directory = data, phase, max_steps, directory
        self.validate_every = min(phase.validate_every, max_steps)
        self.start_score = math.inf
        self.best_score, self.best_step = math.inf, 0
        self.best_weights: dict[str, Tensor] = {}
        self.waited, self.stopped = 0, False

    def state_dict(self) -> dict[str, Any]:
        names = ("start_score", "best_score", "best_step", "best_weights", "waited", "stopped")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = self.stopped

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.data.consumed_batches = batch_idx + 1
        if self.data.consumed_batches % self.phase.accumulate == 0 and trainer.global_step % self.validate_every:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Phase)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.waited += 1
        if module.score < self.best_score:
            weights = module.trainable_weights(trainer.strategy.lightning_module_state_dict())
            self.best_weights = {name: value.detach().cpu().clone() for name, value in weights.items()}
            self.best_score, self.best_step, self.waited = module.score, trainer.global_step, 0
        if self.phase.patience is not None:
            self.stopped = self.waited >= self.phase.patience or not math.isfinite(module.score)
            trainer.should_stop = self.stopped
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.global_step % self.phase.checkpoint_every == 0:
            trainer.save_checkpoint(self.directory / LAST, weights_only=False)


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


def _trainer(module: Phase, config: TrainerConfig, progress: _Progress, loggers: list[Logger]) -> L.Trainer:
    callbacks: list[Callback] = [progress]
    if loggers:
        callbacks.append(LearningRateMonitor("step"))
    if config.progress_bar:
        callbacks.append(_ProgressBar(f"train {' and '.join(module.trainable)}"))
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning would requeue the job itself, from a checkpoint that it also puts in place of what we validate.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    strategy: Strategy | str = "auto"
    if config.strategy == "ddp":
        # Buffers are constants here, and ranks may validate different numbers of batches.
        strategy = DDPStrategy(broadcast_buffers=False)
    elif config.strategy == "fsdp":
        strategy = ShardedBase(config.devices * config.num_nodes)
        callbacks.append(SharedGradients())
    return L.Trainer(
        default_root_dir=progress.directory,
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=cast(Any, config.precision),  # Lightning checks it; its name for the type is private
        max_epochs=1,
        max_steps=progress.max_steps,
        accumulate_grad_batches=module.phase.accumulate,
        gradient_clip_val=module.phase.gradient_clip,
        val_check_interval=progress.validate_every * module.phase.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=callbacks,
        plugins=plugins,
        logger=loggers or False,
        use_distributed_sampler=False,
        enable_checkpointing=False,  # `_Progress` does it
        enable_progress_bar=config.progress_bar,
        enable_model_summary=False,
    )


def fit_phase(
    module: Phase,
    data: PromptDataModule,
    *,
    config: TrainerConfig,
    max_steps: int,
    directory: Path,
    loggers: list[Logger],
    resume: bool,
) -> dict[str, Any]:
    """Train for `max_steps` optimizer steps and leave the best weights in the module.

    With `resume` it goes on from `directory/last.ckpt` if there is one. A base that was sharded stays so.

    Returns:
        Validation figures of the weights kept, and as `warning` what is wrong with the training, or None.
    """
    progress = _Progress(data, module.phase, max_steps, directory)
    trainer = _trainer(module, config, progress, loggers)
    data.consumed_batches = 0
    # The start competes with what training makes of it: a calibrated router may not be worth changing.
    start = {name: value.cpu().clone() for name, value in module.trainable_weights(module.state_dict()).items()}
    [before] = trainer.validate(module, datamodule=data, verbose=False)
    progress.start_score = before["val/score"]
    last = directory / LAST
    try:
        with compiled(find_decoder(module.model.lm)[1]) if config.compile else nullcontext():
            trainer.fit(module, datamodule=data, ckpt_path=str(last) if resume and last.is_file() else None)
    except SystemExit:
        # Lightning ends the process on Ctrl-C; our caller says how to go on.
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    start_score = progress.start_score if math.isfinite(progress.start_score) else math.inf
    kept_score = min(start_score, progress.best_score)
    kept = start if start_score == kept_score else progress.best_weights
    [figures] = trainer.validate(module, datamodule=data, verbose=False)
    last_is_best = figures["val/score"] <= kept_score < math.inf  # training that diverges ends at NaN
    if not last_is_best:
        module.load_state_dict(kept, strict=False)
        [figures] = trainer.validate(module, datamodule=data, verbose=False)
    warning = None
    if module.broken_at is not None:
        warning = f"non-finite loss at step {module.broken_at}"
    elif kept is start and not last_is_best:
        warning = "did not improve on its start"
    return {**figures, "start/score": progress.start_score, "warning": warning}
