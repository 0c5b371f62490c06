"""What each training step sees.

Notation used for tensor shapes: B rows of a batch, T tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recipe.corpus import Corpus, Ints
from recipe.settings import TrainingConfig


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
