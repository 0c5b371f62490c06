"""Time whole training steps of two trainers, from a loaded batch to updated weights."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from firstlab.bench.config import TrainingSpeedConfig
from firstlab.evaluation.timing import synchronize
from firstlab.model.layers import compiled, find_decoder
from firstlab.training.modules import Phase

Row = dict[str, Tensor]


class Watch(Callback, TrainerCallback):
    """Seconds of each step, for Lightning's trainer and for transformers'; the device is synchronised at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.steps.append(time.perf_counter() - self._start)

    on_train_batch_start, on_train_batch_end = on_step_begin, on_step_end

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Take what either trainer passes."""


def firstlab_steps(module: Phase, config: TrainingSpeedConfig, rows: Sequence[Row]) -> list[float]:
    """Seconds of each step of one phase over `rows`, on the device where its model is."""
    device = module.model.device
    watch = Watch(device)
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        max_steps=len(rows) // config.batch_size,
        gradient_clip_val=config.gradient_clip,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lists are datasets to torch, whatever its types say.
    loader: Any = DataLoader(rows, config.batch_size, collate_fn=default_data_collator)  # type: ignore[arg-type]
    layers = compiled(find_decoder(module.model.lm)[1]) if config.compile else nullcontext()
    with warnings.catch_warnings(), layers:
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`.*")
        trainer.fit(module.train(), loader)
    module.to(device)
    return watch.steps


def transformers_steps(model: torch.nn.Module, config: TrainingSpeedConfig, rows: Sequence[Row]) -> list[float]:
    """Seconds of each step of transformers' own trainer over `rows`, on the device where the model is."""
    device = next(model.parameters()).device
    watch = Watch(device)
    names = ("input_ids", "attention_mask", "labels")
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        # The options' newer names are unknown to the oldest transformers we run with.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = TrainingArguments(
            directory,
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=1,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            max_grad_norm=config.gradient_clip,
            optim="adamw_torch",
            gradient_checkpointing=config.gradient_checkpointing,
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
            train_dataset=[{name: row[name] for name in names} for row in rows],  # type: ignore[arg-type]
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return watch.steps
