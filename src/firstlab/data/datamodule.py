"""The Lightning data module: splits of one task and the loaders over them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from firstlab.data.batching import Buckets, DistributedBatches, batch_count, shard_batches
from firstlab.data.encoding import (
    LENGTHS,
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


class PromptDataModule(L.LightningDataModule):
    """Splits of one task, the loaders over them, and how far training is.

    `train`, `val` and `test` are lists of `Example`; `index` in a batch is the position there. Use
    `Trainer(use_distributed_sampler=False, max_epochs=1)`: shards are made here, and the train loader is the whole run.
    `firstlab.config.schema.DataConfig` checks the ranges of the settings.

    Args:
        task: The data.
        tokenizer: Never changed; needs an EOS token.
        train_size: Training examples, fewer where the pool has not enough after validation is taken; None
            takes all.
        val_size: Validation examples, taken from the pool before training examples, or from the task's own
            validation set if it offers `validation()`.
        test_size: Test examples at even distances; None, or more than there are, takes all.
        seed: Of the splits and of the training order.
        max_length: Tokens of prompt and response in training and validation.
        max_prompt_length: Tokens of a prompt in generation; None takes `max_length`.
        max_new_tokens: Tokens that generation adds.
        batch_size: Rows of a training batch over all processes together.
        eval_batch_size: Rows of a validation batch on one process.
        num_workers: Loader processes.
        loss_on: "all" real tokens (phase 1) or "response" tokens only (phase 2).
        epochs: Length of the training run, unless `total_batches` is set.
        total_batches: Length of the training run in batches.
        bucket: Training batches whose samples are sorted by length together (see `Buckets`), which needs the lengths
            of all training examples first; 1 leaves batches as the shuffle makes them.

    Attributes:
        consumed_batches: Training batches done; saved in checkpoints, and where `train_dataloader` starts. The
            training code sets it, in `training_step`: checkpoint callbacks run before `on_train_batch_end`.

    Raises:
        ValueError: Lengths that the tokenizer does not allow (here), data that cannot be used (in `setup`).
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_size: int | None,
        val_size: int,
        test_size: int | None = None,
        seed: int = 0,
        max_length: int = 256,
        max_prompt_length: int | None = None,
        max_new_tokens: int = 80,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        loss_on: LossOn = "all",
        epochs: int = 1,
        total_batches: int | None = None,
        bucket: int = 1,
    ) -> None:
        super().__init__()
        self.task, self.tokenizer = task, tokenizer
        self.train_size, self.val_size, self.test_size, self.seed = train_size, val_size, test_size, seed
        self.max_length, self.max_new_tokens, self.loss_on = max_length, max_new_tokens, loss_on
        self.prompt_option = LENGTHS if max_prompt_length is None else "data.max_prompt_length"
        self.max_prompt_length = max_length if max_prompt_length is None else max_prompt_length
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.epochs, self.total_batches, self.bucket = epochs, total_batches, bucket
        self.consumed_batches = 0
        self._repeats_checked = False
        self._lengths: dict[int, list[int]] = {}
        limit = tokenizer.model_max_length
        if max(max_length, self.max_prompt_length + max_new_tokens) > limit:
            raise ValueError(
                f"{LENGTHS}={max_length} or {self.prompt_option}={self.max_prompt_length} with "
                f"data.max_new_tokens={max_new_tokens} exceeds the tokenizer's model_max_length of "
                f"{limit}: lower them"
            )
        self.pad = pad_id(tokenizer)

    # Splits

    def prepare_data(self) -> None:
        """Loads everything on one process of each machine first, so that the others find downloads done.

        The test set as well: that it cannot be read should show before the training, not after.
        """
        _ = self._train_val, self.test

    def setup(self, stage: str | None = None) -> None:
        """Load what `stage` needs: "fit", "test" (teacher-forced) or "predict" (generation); None is all of them.

        Raises:
            ValueError: A prompt can never fit, which shows here and not in mid-training.
        """
        teacher_forced = [*self.train, *self.val] if stage in (None, "fit") else []
        teacher_forced += self.test if stage in (None, "test") else []
        for example in self._tight(teacher_forced, self.max_length - self.max_length // 2):
            encode(self.task, example, self.tokenizer, self.max_length)
        if stage in (None, "fit"):
            self._warn_of_repeats()
        if stage in (None, "predict"):
            for example in self._tight(self.test, self.max_prompt_length):
                fit_prompt(self.task, example, self.tokenizer, self.max_prompt_length, self.prompt_option)

    def _warn_of_repeats(self) -> None:
        """Say, the first time, if examples to validate or test on are also trained on."""
        if self._repeats_checked:
            return
        self._repeats_checked = True
        trained = {_content(example) for example in self.train}
        counts = [
            f"{repeated} of {len(examples)} {name} examples"
            for name, examples in (("test", self.test), ("validation", self.val))
            if (repeated := sum(_content(example) in trained for example in examples))
        ]
        if counts:
            warn(
                f"{' and '.join(counts)} are also training examples (same source and first reference), which "
                "flatters their scores: remove them from the training data"
            )

    def _tight(self, examples: Sequence[Example], room: int) -> list[Example]:
        """Examples whose prompt may not fit into `room` tokens even with one character of its text only.

        Few prompts have to be tokenised for that: a token is at least a byte, and most tasks have one frame.
        """
        character = 32  # tokens, generously; special tokens included
        lengths: dict[str, int] = {}
        tight = []
        for example in examples:
            frame = self.task.prompt(example, "")
            if frame not in lengths:
                short = len(frame.encode()) + character < room
                lengths[frame] = 0 if short else len(prompt_ids(self.tokenizer, frame, self.task.markup))
            if lengths[frame] + character >= room:
                tight.append(example)
        return tight

    @cached_property
    def _train_val(self) -> tuple[list[Example], list[Example]]:
        pool = self._shuffled(_told_apart(self.task.train_pool(), "training"))
        own_validation = getattr(self.task, "validation", None)
        held_out = own_validation() if own_validation is not None else None
        if held_out is not None:
            if len(held_out) < self.val_size:
                raise ValueError(
                    f"data.val_size={self.val_size}, but the validation set has {len(held_out)} examples: "
                    f"set data.val_size to at most {len(held_out)}"
                )
            val, rest = self._shuffled(_told_apart(held_out, "validation"))[: self.val_size], pool
        else:
            if len(pool) <= self.val_size:
                raise ValueError(
                    f"data.val_size={self.val_size} leaves nothing to train on: the training pool has "
                    f"{len(pool)} examples; set data.val_size to at most {max(len(pool) - 1, 0)}"
                )
            val, rest = pool[: self.val_size], pool[self.val_size :]
        return rest[: self.train_size], val

    def _shuffled(self, examples: Sequence[Example]) -> list[Example]:
        parts = [list(part) for part in by_part(examples)]
        for part in parts:
            random.Random(self.seed).shuffle(part)
        return interleaved(parts)

    @property
    def train(self) -> list[Example]:
        """Training examples."""
        return self._train_val[0]

    @property
    def val(self) -> list[Example]:
        """Validation examples."""
        return self._train_val[1]

    @cached_property
    def test(self) -> list[Example]:
        """Test examples in published order, those of a mixture one part in turn with the others."""
        parts = by_part(_told_apart(self.task.test(), "test"))
        if self.test_size is None:
            return interleaved(parts)
        shares = [len(range(first, self.test_size, len(parts))) for first in range(len(parts))]
        return interleaved([spread(part, share) for part, share in zip(parts, shares, strict=True)])

    # Loaders

    def _world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, rows: TrainingRows, batches: DistributedBatches | list[list[int]]) -> DataLoader[Row]:
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=partial(collate_training, pad=self.pad, loss_on=self.loss_on),
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def _rows(self, examples: Sequence[Example]) -> TrainingRows:
        return TrainingRows(self.task, examples, self.tokenizer, self.max_length)

    def run_batches(self) -> int:
        """Batches of the whole training run."""
        per_epoch = batch_count(len(self.train), self.batch_size)
        return self.epochs * per_epoch if self.total_batches is None else self.total_batches

    def _training_batches(self, **place: int) -> DistributedBatches:
        return DistributedBatches(
            len(self.train),
            self.batch_size,
            self.seed,
            total_batches=self.run_batches(),
            buckets=self._buckets(),
            **place,
        )

    def trained_on(self) -> list[int]:
        """The training examples that the run comes to, in ascending order."""
        return sorted({index for batch in self._training_batches() for index in batch})

    def train_dataloader(self) -> DataLoader[Row]:
        """The training run from `consumed_batches` on, as one stream over epochs.

        Raises:
            ValueError: More processes than rows in a batch.
        """
        rank, world_size = self._world()
        place = {"rank": rank, "world_size": world_size, "start_batch": self.consumed_batches}
        return self._loader(self._rows(self.train), self._training_batches(**place))

    def _buckets(self) -> Buckets | None:
        if self.bucket == 1:
            return None
        # Both phases may cut texts at different lengths.
        if self.max_length not in self._lengths:
            rows = self._rows(self.train)
            found = (rows[index] for index in range(len(rows)))
            self._lengths[self.max_length] = [len(row.prompt) + len(row.response) for row in found]
        return Buckets(self._lengths[self.max_length], self.bucket)

    def val_dataloader(self) -> DataLoader[Row] | list[DataLoader[Row]]:
        """This rank's share of teacher-forced validation, in order; no loader when there is no validation.

        Raises:
            ValueError: Ranks would have different numbers of batches, on which sharded models hang.
        """
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
        return self._loader(self._rows(self.val), shards[rank])

    # Checkpoints

    def _stream(self) -> dict[str, int]:
        """What the order of training batches depends on."""
        stream = {"seed": self.seed, "batch_size": self.batch_size, "train_size": len(self.train)}
        return stream | ({"bucket": self.bucket, "max_length": self.max_length} if self.bucket > 1 else {})

    def state_dict(self) -> dict[str, Any]:
        """How far training is, and in which stream of batches."""
        return {"consumed_batches": self.consumed_batches, "stream": self._stream()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let training go on behind the batches done; the number of processes may have changed.

        Raises:
            ValueError: The checkpoint is from other training data.
        """
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

    def start_over(self) -> None:
        """Begin another training, whatever was resumed before."""
        self.consumed_batches = 0


def _content(example: Example) -> tuple[str, str, str]:
    return example.source, example.question, example.references[0]


def _told_apart(examples: Sequence[Example], split: str) -> list[Example]:
    """The examples under ids of their own; says so where some share one, or have a reference that is their source."""
    counts: Counter[str] = Counter()
    taken: set[str] = set()
    renamed = []
    for example in examples:
        name = example.id
        while name in taken:
            counts[example.id] += 1
            name = f"{example.id}#{counts[example.id] + 1}"
        taken.add(name)
        renamed.append(example if name == example.id else replace(example, id=name))
    if counts:
        first = next(iter(counts))
        warn(
            f"{counts.total()} of {len(examples)} {split} examples have the id of an earlier one (for instance "
            f"'{first}'); they are called '{first}#2' and so on: give each its own"
        )
    copies = [example.id for example in renamed if not example.question and example.source in example.references]
    if copies:
        warn(
            f"{len(copies)} of {len(examples)} {split} examples (for instance '{copies[0]}') have a reference that is "
            "their source: check that they are what the task asks for"
        )
    return renamed


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
