"""The Lightning data module: splits of one task and the loaders over them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache, cached_property, partial
from itertools import zip_longest
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from firstlab.data.batching import Buckets, DistributedBatches, shard_batches
from firstlab.data.encoding import (
    LENGTHS,
    PROMPT_LENGTH,
    LossOn,
    Row,
    TrainingRows,
    collate_training,
    encode,
    fit_prompt,
    pad_id,
    prompt_ids,
)
from firstlab.data.files import spread, warn
from firstlab.data.task import Example, Task


@dataclass(eq=False, repr=False)
class PromptDataModule(L.LightningDataModule):
    """Splits of one task, the loaders over them, and how far training is.

    `train`, `val` and `test` are lists of `Example`; `index` in a batch is the position there. Use
    `Trainer(use_distributed_sampler=False, max_epochs=1)`: shards are made here, and the train loader is the whole run.
    Lengths that the tokenizer does not allow are a ValueError here, data that cannot be used in `setup`;
    `firstlab.config.schema.DataConfig` checks the ranges of the settings.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    train_size: int | None  # fewer where the pool has not enough left after validation; None takes all
    val_size: int  # from the task's `validation()` if it has one, else from the training pool
    test_size: int | None = None  # evenly spread; None, or more than there are, takes all
    seed: int = 0  # of the splits and of the training order
    max_length: int = 256  # tokens of prompt and response in training and validation
    max_prompt_length: int = 256  # tokens of a prompt in generation
    max_new_tokens: int = 80  # that generation adds
    batch_size: int = 8  # rows of a training batch over all processes together
    total_batches: int = 0  # of the training run
    eval_batch_size: int = 8  # rows of a validation batch on one process
    num_workers: int = 0
    loss_on: LossOn = "all"  # real tokens (phase 1), or "response" tokens only (phase 2)
    bucket: int = 1  # training batches whose samples are sorted by length together (see `Buckets`); 1 sorts none

    def __post_init__(self) -> None:
        super().__init__()
        self.pad = pad_id(self.tokenizer)
        # Training batches done: saved in checkpoints, and counted by `firstlab.training.trainer`.
        self.consumed_batches = 0
        self._repeats_checked = False
        self._lengths: dict[int, list[int]] = {}
        if max(self.max_length, self.max_prompt_length + self.max_new_tokens) > self.tokenizer.model_max_length:
            raise ValueError(
                f"{LENGTHS}={self.max_length} or {PROMPT_LENGTH}={self.max_prompt_length} with data.max_new_tokens="
                f"{self.max_new_tokens} exceeds the tokenizer's model_max_length of {self.tokenizer.model_max_length}: "
                "lower them"
            )

    def prepare_data(self) -> None:
        """Load all splits on one process of each machine first, so that the others find downloads done."""
        _ = self._train_val, self.test

    def setup(self, stage: str | None = None) -> None:
        """Load what `stage` needs: "fit", "test" (teacher-forced) or "predict" (generation); None is all of them.

        Refuses prompts that can never fit, before training meets them.
        """
        teacher_forced = [*self.train, *self.val] if stage in (None, "fit") else []
        teacher_forced += self.test if stage in (None, "test") else []
        for example in self._tight(teacher_forced, self.max_length - self.max_length // 2):
            encode(self.task, example, self.tokenizer, self.max_length)
        if stage in (None, "fit"):
            self._warn_of_repeats()
        if stage in (None, "predict"):
            for example in self._tight(self.test, self.max_prompt_length):
                fit_prompt(self.task, example, self.tokenizer, self.max_prompt_length, PROMPT_LENGTH)

    def _warn_of_repeats(self) -> None:
        if self._repeats_checked:
            return
        self._repeats_checked = True
        trained = {(each.source, each.question, each.references[0]) for each in self.train}
        counts = [
            f"{repeated} of {len(examples)} {name} examples"
            for name, examples in (("test", self.test), ("validation", self.val))
            if (repeated := sum((each.source, each.question, each.references[0]) in trained for each in examples))
        ]
        if counts:
            warn(
                f"{' and '.join(counts)} are also training examples (same source and first reference), which "
                "flatters their scores: remove them from the training data"
            )

    def _tight(self, examples: Sequence[Example], room: int) -> list[Example]:
        """Examples whose prompt may not fit into `room` tokens even with only one character of its text."""
        spare = room - 32  # one character, generously, and special tokens

        @cache  # most tasks have one frame
        def fits(frame: str) -> bool:
            short = len(frame.encode()) < spare  # a token is at least a byte
            return short or len(prompt_ids(self.tokenizer, frame, self.task.markup)) < spare

        return [example for example in examples if not fits(self.task.prompt(example, ""))]

    @cached_property
    def _train_val(self) -> tuple[list[Example], list[Example]]:
        pool = self._shuffled(_told_apart(self.task.train_pool(), "training"))
        own_validation = getattr(self.task, "validation", None)
        held_out = None if own_validation is None else own_validation()
        if held_out is not None:
            if len(held_out) < self.val_size:
                raise ValueError(
                    f"data.val_size={self.val_size}, but the validation set has {len(held_out)} examples: "
                    f"set data.val_size to at most {len(held_out)}"
                )
            return pool[: self.train_size], self._shuffled(_told_apart(held_out, "validation"))[: self.val_size]
        if len(pool) <= self.val_size:
            raise ValueError(
                f"data.val_size={self.val_size} leaves nothing to train on: the training pool has "
                f"{len(pool)} examples; set data.val_size to at most {max(len(pool) - 1, 0)}"
            )
        return pool[self.val_size :][: self.train_size], pool[: self.val_size]

    def _shuffled(self, examples: Sequence[Example]) -> list[Example]:
        parts = by_part(examples)
        for part in parts:
            random.Random(self.seed).shuffle(part)
        return interleaved(parts)

    @property
    def train(self) -> list[Example]:
        return self._train_val[0]

    @property
    def val(self) -> list[Example]:
        return self._train_val[1]

    @cached_property
    def test(self) -> list[Example]:
        """Test examples in published order, those of a mixture one part in turn with the others."""
        parts = by_part(_told_apart(self.task.test(), "test"))
        if self.test_size is None:
            return interleaved(parts)
        shares = [len(range(first, self.test_size, len(parts))) for first in range(len(parts))]
        return interleaved([spread(part, share) for part, share in zip(parts, shares, strict=True)])

    def _world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, examples: list[Example], batches: DistributedBatches | list[list[int]]) -> DataLoader[Row]:
        return DataLoader(
            TrainingRows(self.task, examples, self.tokenizer, self.max_length),
            batch_sampler=batches,
            collate_fn=partial(collate_training, pad=self.pad, loss_on=self.loss_on),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _training_batches(self, **place: int) -> DistributedBatches:
        place["total_batches"] = self.total_batches
        return DistributedBatches(len(self.train), self.batch_size, self.seed, buckets=self._buckets(), **place)

    def trained_on(self) -> list[int]:
        """The training examples that the run comes to."""
        return sorted({index for batch in self._training_batches() for index in batch})

    def train_dataloader(self) -> DataLoader[Row]:
        """The training run from `consumed_batches` on, as one stream over epochs."""
        rank, world_size = self._world()
        batches = self._training_batches(rank=rank, world_size=world_size, start_batch=self.consumed_batches)
        return self._loader(self.train, batches)

    def _buckets(self) -> Buckets | None:
        if self.bucket == 1:
            return None
        if self.max_length not in self._lengths:  # each phase has its own
            ids = (encode(self.task, example, self.tokenizer, self.max_length) for example in self.train)
            self._lengths[self.max_length] = [len(prompt) + len(response) for prompt, response in ids]
        return Buckets(self._lengths[self.max_length], self.bucket)

    def val_dataloader(self) -> DataLoader[Row] | list[DataLoader[Row]]:
        """This rank's share of teacher-forced validation, in order; no loader when there is no validation."""
        if not self.val:
            return []
        rank, world_size = self._world()
        shards = [shard_batches(len(self.val), self.eval_batch_size, each, world_size) for each in range(world_size)]
        if len(set(map(len, shards))) > 1:
            raise ValueError(
                f"data.val_size: {len(self.val)} examples in evaluation.batch_size={self.eval_batch_size} give "
                f"some of the {world_size} processes fewer batches than others, which would hang them: set "
                f"evaluation.batch_size to at least 2, a number of examples that {world_size} divides, or "
                "fewer trainer.devices"
            )
        return self._loader(self.val, shards[rank])

    def _stream(self) -> dict[str, int]:
        # What the order of training batches depends on.
        stream = {"seed": self.seed, "batch_size": self.batch_size, "train_size": len(self.train)}
        return stream | ({"bucket": self.bucket, "max_length": self.max_length} if self.bucket > 1 else {})

    def state_dict(self) -> dict[str, Any]:
        return {"consumed_batches": self.consumed_batches, "stream": self._stream()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on behind the batches done; the number of processes may have changed, the data may not."""
        now, saved = self._stream(), state_dict["stream"]
        changed = [
            f"data.{option}: {saved.get(option, 'unset')} in the checkpoint, {now.get(option, 'unset')} now"
            for option in saved | now
            if saved.get(option) != now.get(option)
        ]
        if changed:
            raise ValueError(
                f"cannot resume in the middle of other training data ({'; '.join(changed)}): restore these "
                "options or start a new run"
            )
        self.consumed_batches = state_dict["consumed_batches"]


def _told_apart(examples: Sequence[Example], split: str) -> list[Example]:
    """The examples under unique ids, with a warning where ids repeat or a reference is a copy of its source."""
    counts: Counter[str] = Counter()
    renamed: dict[str, Example] = {}
    for example in examples:
        name = example.id
        while name in renamed:
            counts[example.id] += 1
            name = f"{example.id}#{counts[example.id] + 1}"
        renamed[name] = example if name == example.id else replace(example, id=name)
    if counts:
        first = next(iter(counts))
        warn(
            f"{counts.total()} of {len(examples)} {split} examples have the id of an earlier one (for instance "
            f"'{first}'); they are called '{first}#2' and so on: give each its own"
        )
    copies = [
        example.id for example in renamed.values() if not example.question and example.source in example.references
    ]
    if copies:
        warn(
            f"{len(copies)} of {len(examples)} {split} examples (for instance '{copies[0]}') have a reference that is "
            "their source: check that they are what the task asks for"
        )
    return list(renamed.values())


def by_part(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples of each part of a mixture, in their order; of any other task all of them are one part."""
    parts: dict[str, list[Example]] = {}
    for example in examples:
        parts.setdefault(example.part, []).append(example)
    return list(parts.values())


def interleaved(parts: Sequence[Sequence[Example]]) -> list[Example]:
    """One example of each part in turn, so that every stretch of the result has them all in even shares."""
    turns = zip_longest(*parts)
    return [example for turn in turns for example in turn if example is not None]
