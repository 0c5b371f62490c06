"""Quality metrics: pure functions of predictions and references, on a scale of 0 to 100, higher is better.

| kind | metrics |
|---|---|
| translation | bleu1, bleu2 (NLTK), bleu, chrf (sacreBLEU), comet |
| summarization | rouge1, rougeL, rougeLsum, bertscore |
| qa | em, f1 (SQuAD v1.1) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from firstlab.metrics import qa, summarization, translation
from firstlab.metrics.comet import comet as comet_scores
from firstlab.metrics.language_modeling import perplexity
from firstlab.metrics.scores import FloatArray, MetricUnavailableError, Scores
from firstlab.metrics.settings import BertScoreConfig, CometConfig
from firstlab.metrics.statistics import PairedTest, bootstrap_interval, paired_test

__all__ = [
    "PRIMARY_METRIC",
    "BertScoreConfig",
    "CometConfig",
    "MetricResult",
    "MetricUnavailableError",
    "PairedTest",
    "Scores",
    "bootstrap_interval",
    "evaluate_predictions",
    "from_rows",
    "paired_test",
    "perplexity",
]

#: The headline metric of each kind of task.
PRIMARY_METRIC: dict[str, str] = {"translation": "bleu", "summarization": "rougeL", "qa": "f1"}


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric on one test set.

    Attributes:
        value: The score, 0..100.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        n: Number of examples.
        signature: What one must know to reproduce the figure.
        per_example: Scores per example, 0..100, where the metric is their mean.
        rows: `[n, K]` sufficient statistics per example; `from_rows` makes `Scores` of them again.
    """

    value: float
    low: float
    high: float
    n: int
    signature: str | None = None
    higher_is_better: bool = True
    per_example: list[float] | None = None
    rows: FloatArray = field(default_factory=lambda: np.zeros((0, 2)), repr=False, compare=False)

    def to_dict(self) -> dict[str, float | int | str | bool | None]:
        """All fields but `per_example` and `rows`, ready for JSON."""
        fields = asdict(self)
        del fields["per_example"], fields["rows"]
        return fields


def evaluate_predictions(
    kind: str,
    predictions: Sequence[str],
    references: Sequence[tuple[str, ...]],
    sources: Sequence[str] = (),
    target_language: str | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    bertscore: BertScoreConfig | None = None,
    comet: CometConfig | None = None,
) -> dict[str, MetricResult]:
    """Every metric of a kind of task, each with its bootstrap interval.

    Args:
        kind: "translation", "summarization" or "qa".
        predictions: One text per example.
        references: One tuple of accepted texts per example.
        sources: Source texts; only COMET reads them.
        target_language: Code or tag of a translation's language; decides the tokenizer of BLEU.
        confidence: Coverage of the intervals.
        resamples: Bootstrap resamples.
        seed: Seed of the resampling.
        bertscore: Encoder of BERTScore; without one "bertscore" is left out.
        comet: Model of COMET; without one "comet" is left out.

    Raises:
        ValueError: Unknown kind, or empty or unpaired inputs.
        MetricUnavailableError: A metric's model, program or tokenizer is not there.
    """
    match kind:
        case "translation":
            scores = {
                "bleu1": translation.bleu_n(predictions, references, 1, target_language),
                "bleu2": translation.bleu_n(predictions, references, 2, target_language),
                "bleu": translation.bleu(predictions, references, target_language),
                "chrf": translation.chrf(predictions, references),
            }
            if comet is not None and comet.model is not None:
                scores["comet"] = comet_scores(sources, predictions, references, comet)
        case "summarization":
            scores = summarization.rouge(predictions, references)
            if bertscore is not None and bertscore.path is not None:
                scores["bertscore"] = summarization.bertscore(predictions, references, bertscore)
        case "qa":
            scores = {"em": qa.exact_match(predictions, references), "f1": qa.f1(predictions, references)}
        case _:
            raise ValueError(f"kind={kind!r} is not a kind of task; one of {', '.join(PRIMARY_METRIC)}")
    results = {}
    for name, metric in scores.items():
        low, high = bootstrap_interval(metric, confidence=confidence, resamples=resamples, seed=seed)
        results[name] = MetricResult(
            metric.value, low, high, len(metric), metric.signature, per_example=metric.per_example, rows=metric.rows
        )
    return results


def from_rows(name: str, rows: FloatArray, signature: str | None = None) -> Scores:
    """A metric from the rows per example that a result record keeps.

    Args:
        name: The metric's name in `evaluate_predictions`; of a part of a mixture PART/NAME.
        rows: `[n, K]`.
    """
    aggregate = translation.SCORES_OF_SUMS.get(name.rpartition("/")[2])
    if aggregate is None:
        return Scores.mean(rows[:, 0].tolist(), signature)
    return Scores.corpus(rows, aggregate, signature)
