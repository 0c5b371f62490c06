"""Bootstrap intervals and paired tests of scores, for means and corpus metrics alike; perplexity.

Both draw examples, never tokens; one seed draws the same resamples for every metric and system of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from firstlab.metrics.scores import FloatArray, Scores

#: Draws held in memory at once (resamples x examples).
_CHUNK = 4_000_000


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
