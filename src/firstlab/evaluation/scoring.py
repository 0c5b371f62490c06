"""Score responses with the metrics of their task."""

from __future__ import annotations

import math
from collections.abc import Sequence

from firstlab.config.schema import EvaluationConfig
from firstlab.data.task import Example, Task
from firstlab.metrics import PRIMARY_METRIC, MetricResult, evaluate_predictions
from firstlab.metrics.translation import load_bleu


def score_texts(
    task: Task, examples: Sequence[Example], texts: Sequence[str], config: EvaluationConfig
) -> dict[str, MetricResult]:
    """Every metric of the task, with intervals; see `firstlab.metrics.evaluate_predictions`.

    Of a mixture each part's metrics as PART/NAME, and "mean", the mean of the parts' headline metrics.
    """
    if task.parts:
        found: dict[str, MetricResult] = {}
        for name, part in task.parts.items():
            own = [i for i, example in enumerate(examples) if example.part == name]
            if own:
                scores = score_texts(part, [examples[i] for i in own], [texts[i] for i in own], config)
                found |= {f"{name}/{metric}": score for metric, score in scores.items()}
        headlines = [f"{name}/{primary_metric(part)}" for name, part in task.parts.items()]
        return {"mean": mean_score([found[key] for key in headlines if key in found])} | found
    return evaluate_predictions(
        task.kind,
        texts,
        [example.references for example in examples],
        [example.source for example in examples],
        task.target_language,
        confidence=config.confidence,
        resamples=config.resamples,
        bertscore=config.bertscore,
        comet=config.comet,
    )


def primary_metric(task: Task) -> str:
    """A task's headline metric."""
    return "mean" if task.parts else PRIMARY_METRIC[task.kind]


def mean_score(parts: Sequence[MetricResult]) -> MetricResult:
    """The mean of scores on different, so independent, examples: half-widths of intervals add in squares."""
    count = len(parts)
    value = sum(part.value for part in parts) / count
    below = math.hypot(*(part.value - part.low for part in parts)) / count
    above = math.hypot(*(part.high - part.value for part in parts)) / count
    return MetricResult(value, value - below, value + above, sum(part.n for part in parts))


def check_metrics(task: Task, config: EvaluationConfig) -> None:
    """Try the metrics; ValueError if the model, program or tokenizer of one is missing, before anything is trained."""
    for each in task.parts.values() or [task]:
        if each.kind == "translation":
            load_bleu(each.target_language)
        if config.bertscore.path is not None or config.comet.model is not None:
            score_texts(each, [Example("probe", "a house", ("ein Haus",))], ["ein Haus"], config)
