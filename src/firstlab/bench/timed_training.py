"""Seconds of whole training steps, from a batch that is there to updated weights, of Lightning's and of transformers'
trainer.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from firstlab.evaluation.timing import synchronize
from firstlab.training.modules import LoRACompensationModule, RouterModule

Row = dict[str, Tensor]


class Seconds:
    """The time between pairs of calls; the device is synchronised at each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self._start = 0.0

    def begin(self) -> None:
        """A step begins."""
        synchronize(self.device)
        self._start = time.perf_counter()

    def end(self) -> None:
        """It has ended."""
        synchronize(self.device)
        self.steps.append(time.perf_counter() - self._start)


class _LightningWatch(Callback):
    def __init__(self, seconds: Seconds) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *args: Any) -> None:
        self.seconds.begin()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.end()


class _TransformersWatch(TrainerCallback):
    def __init__(self, seconds: Seconds) -> None:
        self.seconds = seconds

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.end()


def firstlab_steps(
    module: RouterModule | LoRACompensationModule, rows: Sequence[Row], batch_size: int, clip: float
) -> list[float]:
    """Seconds of each step of one phase over `rows`, on the device where its model is."""
    device = module.model.device
    seconds = Seconds(device)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        gradient_clip_val=clip,
        callbacks=[_LightningWatch(seconds)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lists are datasets to torch, whatever its types say.
    loader: Any = DataLoader(rows, batch_size, collate_fn=default_data_collator)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`.*")
        trainer.fit(module, loader)
    module.to(device)
    return seconds.steps


def transformers_steps(
    model: torch.nn.Module, rows: Sequence[Row], batch_size: int, clip: float, learning_rate: float, checkpointing: bool
) -> list[float]:
    """Seconds of each step of transformers' own trainer over `rows`, on the device where the model is."""
    device = next(model.parameters()).device
    seconds = Seconds(device)
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        # The options' newer names are unknown to the oldest transformers we run with.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            max_grad_norm=clip,
            optim="adamw_torch",
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        arguments._n_gpu = 1  # else a step takes a batch on every GPU there is
        trainer = Trainer(
            model,
            arguments,
            train_dataset=list(rows),  # type: ignore[arg-type]
            data_collator=default_data_collator,
            callbacks=[_TransformersWatch(seconds)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return seconds.steps
