"""Quality metrics: pure functions of predictions and references, on a scale of 0 to 100, higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from firstlab.metrics import qa, summarization, translation
from firstlab.metrics.comet import CometConfig
from firstlab.metrics.comet import comet as comet_scores
from firstlab.metrics.scores import FloatArray, PairedTest, Scores, bootstrap_interval, paired_test, perplexity
from firstlab.metrics.summarization import BertScoreConfig

__all__ = ["PRIMARY_METRIC", "MetricResult", "evaluate_predictions", "from_rows"]
__all__ += ["PairedTest", "Scores", "bootstrap_interval", "paired_test", "perplexity"]

#: The headline metric of each kind of task.
PRIMARY_METRIC: dict[str, str] = {"translation": "bleu", "summarization": "rougeL", "qa": "f1"}


@dataclass(frozen=True)
class MetricResult:
    """One metric on one test set: the score and its bootstrap interval, 0..100."""

    value: float
    low: float
    high: float
    n: int  # examples
    signature: str | None = None  # what one must know to reproduce the figure
    rows: FloatArray | None = field(default=None, repr=False, compare=False)  # [n, K] per example, for `from_rows`

    def to_dict(self) -> dict[str, float | int | str | None]:
        """All fields but `rows`, ready for JSON."""
        return {key: value for key, value in vars(self).items() if key != "rows"}


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
        references: The texts that are accepted for each example.
        sources: Only COMET reads them.
        target_language: Code or tag; decides the tokenizer of BLEU.
        bertscore, comet: The metric is left out unless it has a model.
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
            scores = {"em": qa.best_answer(qa.answer_em, predictions, references)}
            scores["f1"] = qa.best_answer(qa.answer_f1, predictions, references)
        case _:
            raise ValueError(f"kind={kind!r} is not a kind of task; one of {', '.join(PRIMARY_METRIC)}")
    results = {}
    for name, metric in scores.items():
        low, high = bootstrap_interval(metric, confidence=confidence, resamples=resamples, seed=seed)
        results[name] = MetricResult(metric.value, low, high, len(metric), metric.signature, metric.rows)
    return results


def from_rows(name: str, rows: FloatArray) -> Scores:
    """A metric, NAME or (of a part of a mixture) PART/NAME, from the rows [n, K] that a result record keeps."""
    aggregate = translation.SCORES_OF_SUMS.get(name.rpartition("/")[2])
    return Scores.corpus(rows, aggregate) if aggregate else Scores.mean(rows[:, 0].tolist())
