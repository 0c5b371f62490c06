"""The common form of every metric: one row of numbers per example, and how sums of rows become the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Texts = Sequence[str]
References = Sequence[Sequence[str]]
FloatArray = NDArray[np.float64]
#: Scores [R], 0..100, of sums of rows [R, K].
Aggregate = Callable[[FloatArray], FloatArray]


class MetricUnavailableError(ValueError):
    """A metric needs a model, a program or a network that is not there; the message names the way out."""


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one metric keeps of n examples.

    The score of any subset, resample or mixture of examples follows from the sum of its rows alone, so that corpus
    metrics such as BLEU are as cheap to bootstrap as means.
    """

    rows: FloatArray  # [n, K] sufficient statistics
    aggregate: Aggregate
    signature: str | None = None  # what one must know to reproduce the figure

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def per_example(self) -> list[float] | None:
        """Scores 0..100, where the metric is their mean."""
        return self.rows[:, 0].tolist() if self.aggregate is _ratio else None

    @property
    def value(self) -> float:
        """The metric over all examples, 0..100."""
        return float(self.aggregate(self.rows.sum(axis=0, keepdims=True))[0])

    @classmethod
    def mean(cls, values: Sequence[float], signature: str | None = None) -> Scores:
        """A metric that is the mean of one value per example (0..100), all of them finite."""
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0:
            raise ValueError("a mean needs at least one example; got none")
        if not np.isfinite(array).all():
            raise ValueError(f"score of example {int(np.argmin(np.isfinite(array)))} is not finite")
        return cls(np.stack([array, np.ones_like(array)], axis=1), _ratio, signature)

    @classmethod
    def corpus(cls, rows: Any, aggregate: Aggregate, signature: str | None = None) -> Scores:
        """A metric of summed counts `[n, K]`, such as BLEU."""
        return cls(np.asarray(rows, dtype=np.float64), aggregate, signature)

    @classmethod
    def average(cls, parts: Sequence[Scores]) -> Scores:
        """The mean score of several systems (or seeds) on the same examples, itself resampled by example."""
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"an average needs scores of the same examples; sizes: {[len(part) for part in parts]}")
        ends = np.cumsum([part.rows.shape[1] for part in parts])[:-1]
        return cls(
            np.concatenate([part.rows for part in parts], axis=1),
            lambda sums: _mean_of([part.aggregate for part in parts], np.split(sums, ends, axis=1)),
            parts[0].signature,
        )

    @classmethod
    def mixture(cls, parts: Sequence[Scores]) -> Scores:
        """The mean score of parts, each on examples of its own; all examples are resampled together."""
        widths = [part.rows.shape[1] for part in parts]
        ends = np.cumsum(widths)
        rows = np.zeros((sum(map(len, parts)), ends[-1]))
        first = 0
        for part, end, width in zip(parts, ends, widths, strict=True):
            rows[first : first + len(part), end - width : end] = part.rows
            first += len(part)
        return cls(rows, lambda sums: _mean_of([part.aggregate for part in parts], np.split(sums, ends[:-1], axis=1)))

    @classmethod
    def blend(cls, a: Scores, b: Scores, share: float) -> Scores:
        """What one metric expects of a system that answers `share` of the examples as B does, the others as A does."""
        if len(a) != len(b):
            raise ValueError(f"a blend needs scores of the same examples; sizes: {[len(a), len(b)]}")
        return cls((1 - share) * a.rows + share * b.rows, a.aggregate, a.signature)


def check_pairs(predictions: Texts, references: References) -> None:
    """Raises ValueError unless there is a prediction and each has a reference."""
    if not predictions:
        raise ValueError("predictions are empty: there is nothing to score")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: they must pair")
    for index, accepted in enumerate(references):
        if isinstance(accepted, str):
            raise ValueError(f"references[{index}] is a string; give a tuple of accepted strings")
        if not accepted:
            raise ValueError(f"references[{index}] is empty: every example needs at least one reference")


def _mean_of(aggregates: Sequence[Aggregate], pieces: Sequence[FloatArray]) -> FloatArray:
    scores = [aggregate(piece) for aggregate, piece in zip(aggregates, pieces, strict=True)]
    return np.asarray(np.mean(scores, axis=0))


def _ratio(sums: FloatArray) -> FloatArray:
    return sums[:, 0] / sums[:, 1]
