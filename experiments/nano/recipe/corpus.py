"""From examples to token ids: trains the tokenizer, makes the corpus, and says what each training step sees of it.

Notation used for tensor shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from firstlab.data.task import Example, Task
from firstlab.store.files import write_atomically
from recipe.generated import GeneratedExample
from recipe.settings import RecipeConfig, TrainingConfig, weight_settings

log = logging.getLogger(__name__)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
# Words keep the space before them, digits stand alone, so that numbers are copied digit by digit.
_PIECES = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

Ints = NDArray[np.int64]


@runtime_checkable
class Generated(Protocol):
    """A task that makes as many training examples as one asks for, all apart from its test set."""

    def generate(self, count: int, seed: int) -> list[Example]: ...


def training_examples(task: Task, count: int, seed: int) -> list[Example]:
    """`count` generated examples, or the task's train pool when `count` is 0.

    Raises:
        ValueError: `count` is set for a task that generates nothing.
    """
    if count == 0:
        return task.train_pool()
    if not isinstance(task, Generated):
        raise ValueError(f"count={count} needs a task that generates text, {type(task).__name__} does not: set 0")
    return task.generate(count, seed)


def frame_lines(task: Task) -> list[str]:
    """The fixed lines of a task's prompts, with the line ends around them."""
    prompt = task.prompt(Example(id="frame", source="\0", references=("",), question="\0"))
    return [line for piece in prompt.split("\0") for line in re.findall(r"\n*[^\n]+\n*", piece)]


def train_tokenizer(texts: Iterable[str], frame: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which every line of the prompts' frame is one token, so that prompts stay short.

    The start of every text and line gets a space, which decoding takes away, so that a word is the same token
    wherever it stands. BOS comes first; any text without BOS, EOS and PAD written in it
    survives the round trip.
    """
    frame = sorted(set(frame))
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.Replace("\n", "\n "), normalizers.Prepend(" ")])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - len(frame),
            special_tokens=[PAD, BOS, EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.add_tokens([AddedToken(line, normalized=False, special=False) for line in frame])
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(Regex(r"(?:\A|(?<=\n)) "), "")])
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Corpus:
    """All training examples as token ids, one behind the other, task by task."""

    ids: Ints
    answer_lengths: Ints
    """For each token of an answer, EOS included, how many tokens the answer has; 0 elsewhere."""
    starts: Ints
    """Where each example starts in `ids`, and the end of the last one."""
    sizes: Ints
    """Examples of each task."""

    def lengths(self) -> Ints:
        """Tokens of each example, prompt and response."""
        return np.diff(self.starts)

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part.npz")
        np.savez(part, ids=self.ids, answer_lengths=self.answer_lengths, starts=self.starts, sizes=self.sizes)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        with np.load(path) as arrays:
            return cls(**{name: arrays[name] for name in arrays.files})


def turns(task: Task, example: Example) -> Iterator[tuple[str, str]]:
    """What is asked and what is to be answered: the prompt, then each further question on the same text."""
    yield task.prompt(example), example.references[0]
    for question, answer in example.more if isinstance(example, GeneratedExample) else ():
        prompt = task.prompt(replace(example, question=question))
        yield prompt.partition(example.source)[2], answer


def encode_corpus(
    tokenizer: PreTrainedTokenizerFast, tasks: Sequence[tuple[Task, Sequence[Example]]], max_length: int
) -> Corpus:
    """Prompt and first reference of every example, closed with EOS, and its further questions and answers.

    Turns that would make an example longer than `max_length` are left out, with all that follows them.

    Raises:
        ValueError: Nothing of a task is left.
    """
    ids: list[int] = []
    answer_lengths: list[int] = []
    starts, sizes = [0], []
    for task, examples in tasks:
        before = len(starts)
        of_all = [list(turns(task, example)) for example in examples]
        asked = tokenizer([text for of_one in of_all for text, _ in of_one], add_special_tokens=False)["input_ids"]
        answered = tokenizer([text for of_one in of_all for _, text in of_one], add_special_tokens=False)["input_ids"]
        encoded = zip(asked, answered, strict=True)
        for of_one in of_all:
            row, answers = [tokenizer.bos_token_id], [0]
            for prompt, answer in list(itertools.islice(encoded, len(of_one))):
                length = len(answer) + 1
                if len(row) + len(prompt) + length > max_length:
                    break
                row += [*prompt, *answer, tokenizer.eos_token_id]
                answers += [0] * len(prompt) + [length] * length
            if answers[-1] > 0:
                ids += row
                answer_lengths += answers
                starts.append(len(ids))
        sizes.append(len(starts) - before)
        if sizes[-1] == 0:
            raise ValueError(f"training.max_length={max_length} leaves no example of {type(task).__name__}: raise it")
    return Corpus(*(np.asarray(values, np.int64) for values in (ids, answer_lengths, starts, sizes)))


def prepare(config: RecipeConfig, tasks: dict[str, Task], work: Path) -> None:
    """Writes tokenizer and corpus into `work` unless they are there already.

    Raises:
        ValueError: What is there was made by another recipe.
    """
    path = work / "recipe.json"
    if path.exists():
        if json.loads(path.read_text()) != weight_settings(config):
            raise ValueError(
                f"work_dir={config.work_dir} holds a run of another recipe (see recipe.json there): choose another "
                "work_dir, or delete this one to start anew"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    pools = {name: training_examples(task, config.tasks[name].count, config.seed) for name, task in tasks.items()}
    scored = [name for name in tasks if config.tasks[name].scored]
    seen = [example for name in scored for example in pools[name][: config.tokenizer_examples]]
    tokenizer = train_tokenizer(
        (text for e in seen for text in (e.source, e.question, e.references[0]) if text),
        (line for task in tasks.values() for line in frame_lines(task)),
        config.model.vocab_size,
    )
    tokenizer.model_max_length = config.model.max_position_embeddings
    tokenizer.save_pretrained(work / "tokenizer")
    corpus = encode_corpus(tokenizer, [(task, pools[name]) for name, task in tasks.items()], config.training.max_length)
    corpus.save(work / "corpus.npz")
    log.info("%d examples, %.1f M tokens, vocabulary %d", len(corpus.lengths()), len(corpus.ids) / 1e6, len(tokenizer))
    write_atomically(path, json.dumps(weight_settings(config), indent=1) + "\n")


def endless(first: int, size: int, rng: np.random.Generator) -> Iterator[int]:
    """`first` to `first + size - 1`, permuted anew in each round."""
    while True:
        yield from (first + rng.permutation(size)).tolist()


def cut_by_tokens(rows: Ints, lengths: Ints, tokens: int) -> list[Ints]:
    """Rows, which are sorted by length, in runs of at most `tokens` tokens, padding counted."""
    batches: list[Ints] = []
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * lengths[rows[end]] > tokens:
            batches.append(rows[start:end])
            start = end
    return batches


def plan_steps(
    corpus: Corpus, weights: Sequence[float], training: TrainingConfig, seeds: Sequence[int]
) -> Iterator[list[Ints]]:
    """The batches of each step, for ever; rows of a batch are of similar length."""
    rng = np.random.default_rng([*seeds, 0])
    lengths = corpus.lengths()
    firsts = np.cumsum([0, *corpus.sizes[:-1]])
    streams = [
        endless(int(first), int(size), np.random.default_rng([*seeds, 1, task]))
        for task, (first, size) in enumerate(zip(firsts, corpus.sizes, strict=True))
    ]
    shares = [math.ceil(training.window * weight / sum(weights)) for weight in weights]
    pending: list[Ints] = []
    while True:
        drawn = [itertools.islice(stream, share) for stream, share in zip(streams, shares, strict=True)]
        rows = rng.permutation(np.fromiter(itertools.chain(*drawn), np.int64))
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches = cut_by_tokens(rows, lengths, training.tokens_per_batch)
        pending += [batches[i] for i in rng.permutation(len(batches))]
        while len(pending) >= training.batches_per_step:
            yield pending[: training.batches_per_step]
            del pending[: training.batches_per_step]


def collate(corpus: Corpus, rows: Ints, prompt_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [B, T], padded on the right with 0, the loss weight and the response mask of each token [B, T].

    The tokens of an answer of n tokens weigh n^-1/2 each: were all tokens alike, long answers would drown the
    short ones, were all answers alike, there would be less to learn from a long one than there is in it. The n
    tokens outside the answers the same, times `prompt_weight`.
    """
    shape = (len(rows), int(corpus.lengths()[rows].max()))
    ids, weights = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    response = torch.zeros(shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        start, end = corpus.starts[row], corpus.starts[row + 1]
        answers = torch.from_numpy(corpus.answer_lengths[start:end])
        asked = answers == 0
        ids[i, : end - start] = torch.from_numpy(corpus.ids[start:end])
        response[i, : end - start] = ~asked
        lengths = torch.where(asked, asked.sum(), answers)
        weights[i, : end - start] = torch.where(asked, prompt_weight, 1.0) * lengths**-0.5
    weights[:, 0] = 0.0  # nothing predicts BOS
    return ids, weights, response
