"""The common form of every metric, one row of numbers per example, and its intervals and paired tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Texts = Sequence[str]
References = Sequence[Sequence[str]]
FloatArray = NDArray[np.float64]
#: Scores [R], 0..100, of sums of rows [R, K].
Aggregate = Callable[[FloatArray], FloatArray]
#: Draws held in memory at once (resamples x examples). Drawn are examples, never tokens; one seed draws the same
#: resamples for every metric and system of the same size.
_CHUNK = 4_000_000


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


@dataclass(frozen=True, slots=True)
class PairedTest:
    """Two systems on the same examples."""

    difference: float  # score of A minus score of B, in points of 0..100
    p_value: float  # two-sided, paired approximate randomisation
    low: float  # paired bootstrap interval of the difference
    high: float


def bootstrap_interval(
    scores: Scores, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of a metric (Efron 1979; for BLEU, Koehn 2004)."""
    drawn = [scores.aggregate(counts @ scores.rows) for counts in _resamples(len(scores), resamples, seed)]
    return _percentiles(drawn, confidence)


def paired_test(a: Scores, b: Scores, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0) -> PairedTest:
    """Test whether A and B, scored on the same examples by the same metric, differ.

    Each trial swaps the two systems' outputs on a random half of the examples. The p-value is the share of trials whose
    absolute difference reaches the observed one (Riezler and Maxwell 2005), which is counted in, so it is never 0.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same examples: A has {len(a)}, B has {len(b)}")
    difference = a.value - b.value
    drawn = [a.aggregate(x @ a.rows) - b.aggregate(x @ b.rows) for x in _resamples(len(a), resamples, seed)]
    low, high = _percentiles(drawn, confidence)
    total_a, total_b, delta = a.rows.sum(axis=0), b.rows.sum(axis=0), b.rows - a.rows
    reached = 0
    for swapped in _swaps(len(a), resamples, seed):
        moved = swapped @ delta
        trial = a.aggregate(total_a + moved) - b.aggregate(total_b - moved)
        # Swapping everything or nothing must count as equal whatever the order of summation.
        reached += int(np.sum(np.abs(trial) >= abs(difference) - 1e-9))
    return PairedTest(difference, (reached + 1) / (resamples + 1), low, high)


def perplexity(total_nll: float, token_count: int) -> float:
    """exp of the mean negative log-likelihood (in nats) per token; infinite where it exceeds a float."""
    if token_count < 1:
        raise ValueError(f"token_count={token_count} must be at least 1: perplexity needs scored tokens")
    if math.isnan(total_nll):
        raise ValueError("total_nll is NaN: the model's loss diverged")
    try:
        return math.exp(total_nll / token_count)
    except OverflowError:
        return math.inf


def _resamples(n: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Chunks `[R, n]`: how often each example is drawn, n draws with replacement per row."""
    generator = np.random.default_rng([seed, 0])
    for size in _chunks(n, resamples):
        drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.float64)


def _swaps(n: int, trials: int, seed: int) -> Iterator[FloatArray]:
    """Chunks `[R, n]` of 0 and 1: which examples change sides."""
    generator = np.random.default_rng([seed, 1])
    for size in _chunks(n, trials):
        yield generator.integers(2, size=(size, n)).astype(np.float64)


def _chunks(n: int, total: int) -> Iterator[int]:
    size = max(1, _CHUNK // n)
    for start in range(0, total, size):
        yield min(size, total - start)


def _percentiles(drawn: list[FloatArray], confidence: float) -> tuple[float, float]:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(drawn), [tail, 1.0 - tail])
    return float(low), float(high)
