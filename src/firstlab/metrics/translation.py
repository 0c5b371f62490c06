"""Translation metrics: NLTK's BLEU-1 and BLEU-2 (the paper's figures), and sacreBLEU's BLEU and chrF."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nltk import __version__ as nltk_version
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.bleu_score import brevity_penalty, closest_ref_length, modified_precision
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from firstlab.metrics.scores import Scores, check_pairs


def is_chinese(language: str | None) -> bool:
    """Whether a language code such as "zh", "zh-CN" or "zh_Hant" means Chinese."""
    return language is not None and language.lower().replace("_", "-").split("-")[0] == "zh"


def tokenize(text: str, target_language: str | None) -> list[str]:
    """Tokens of NLTK BLEU.

    Chinese: every character that is not white space. Else NLTK's `wordpunct_tokenize`: runs of letters and
    digits, and runs of punctuation; it needs no data files. Case is kept.
    """
    return list("".join(text.split())) if is_chinese(target_language) else wordpunct_tokenize(text)


def bleu_n(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    order: int,
    target_language: str | None = None,
) -> Scores:
    """BLEU with uniform weights on 1..`order`-grams, 0..100, equal to NLTK's `corpus_bleu`.

    Not smoothed, as NLTK does by default: an order without any match takes the smallest float for its
    precision, so the score is 0 for all purposes.

    Raises:
        ValueError: Empty or unpaired inputs, or `order` below 1.
    """
    check_pairs(predictions, references)
    if order < 1:
        raise ValueError(f"order={order} must be at least 1: 1 for BLEU-1, 2 for BLEU-2")
    rows = []
    for prediction, accepted in zip(predictions, references, strict=True):
        hypothesis = tokenize(prediction, target_language)
        targets = [tokenize(reference, target_language) for reference in accepted]
        precisions = [modified_precision(targets, hypothesis, n) for n in range(1, order + 1)]
        rows.append(
            [len(hypothesis), closest_ref_length(targets, len(hypothesis))]
            + [precision.numerator for precision in precisions]
            + [precision.denominator for precision in precisions]
        )

    tokens = "char" if is_chinese(target_language) else "wordpunct"
    signature = f"order:{order}|case:mixed|tok:{tokens}|smooth:none|nltk:{nltk_version}"
    return Scores.corpus(rows, _bleu_from_sums, signature)


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], target_language: str | None = None) -> Scores:
    """sacreBLEU's BLEU-4, 0..100: tokenizer `zh` for Chinese, else `13a`; exponential smoothing.

    Raises:
        ValueError: Empty or unpaired inputs.
    """
    # force: silence the advice about tokenised text; predictions are scored as they are.
    metric = BLEU(tokenize="zh" if is_chinese(target_language) else "13a", force=True)
    return _sacrebleu(metric, predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """sacreBLEU's chrF2 (character 1..6-grams, no words), 0..100.

    Raises:
        ValueError: Empty or unpaired inputs.
    """
    return _sacrebleu(CHRF(), predictions, references)


def _sacrebleu(metric: Metric, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    check_pairs(predictions, references)
    # sacreBLEU wants one stream per reference position, None where an example has fewer.
    width = max(len(accepted) for accepted in references)
    streams: list[list[Any]] = [
        [accepted[i] if i < len(accepted) else None for accepted in references] for i in range(width)
    ]
    # The same two steps as sacreBLEU's own significance tests, so every score here is the library's.
    rows = metric._extract_corpus_statistics(list(predictions), streams)
    return Scores.corpus(rows, _score_of_sums(metric), str(metric.get_signature()))


def _score_of_sums(metric: Metric) -> Callable[[list[float]], float]:
    def score(sums: list[float]) -> float:
        return float(metric._compute_score_from_stats([int(count) for count in sums]).score)

    return score


def _bleu_from_sums(sums: list[float]) -> float:
    """BLEU in 0..100 from [hypothesis length, reference length, matches per order, n-grams per order]."""
    hypothesis_length, reference_length, *counts = sums
    order = len(counts) // 2
    matches, totals = counts[:order], counts[order:]
    if matches[0] == 0:
        return 0.0
    logs = [math.log(m / t if m else sys.float_info.min) for m, t in zip(matches, totals, strict=True)]
    brevity: float = brevity_penalty(reference_length, hypothesis_length)
    return 100.0 * brevity * math.exp(sum(logs) / order)


#: How summed rows become the score, by metric; sacreBLEU's tokenizer has done its work by then.
SCORE_OF_SUMS: dict[str, Callable[[list[float]], float]] = {
    "bleu1": _bleu_from_sums,
    "bleu2": _bleu_from_sums,
    "bleu": _score_of_sums(BLEU()),
    "chrf": _score_of_sums(CHRF()),
}
