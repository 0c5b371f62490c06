"""Translation metrics: NLTK's BLEU-1 and BLEU-2 (the paper's figures), and sacreBLEU's BLEU and chrF."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from sacrebleu.metrics.base import Metric
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from firstlab.metrics.scores import (
    Aggregate,
    FloatArray,
    MetricUnavailableError,
    References,
    Scores,
    Texts,
    check_pairs,
)

#: sacreBLEU's tokenizers of languages where words are not what stands between spaces. Everywhere else it is 13a.
_TOKENIZERS = {
    "zh": ("zh", "zho", "chi", "cmn", "yue"),
    "ja-mecab": ("ja", "jpn"),
    "ko-mecab": ("ko", "kor"),
    "char": ("bo", "bod", "tib", "dz", "dzo", "km", "khm", "lo", "lao", "my", "mya", "bur", "th", "tha"),
}


def bleu_tokenizer(target_language: str | None) -> str:
    """The name of sacreBLEU's tokenizer for a language, given as a code or tag: "zh", "zh-CN", "jpn_Jpan"."""
    language = (target_language or "").replace("_", "-").partition("-")[0].lower()
    return next((name for name, languages in _TOKENIZERS.items() if language in languages), "13a")


def by_character(target_language: str | None) -> bool:
    """Whether BLEU-1 and BLEU-2 count characters: in scripts without spaces between words (Korean has them)."""
    return bleu_tokenizer(target_language) not in ("13a", "ko-mecab")


def load_bleu(target_language: str | None = None) -> BLEU:
    """sacreBLEU's BLEU for a language; MetricUnavailableError where its tokenizer is not installed."""
    tokenizer = bleu_tokenizer(target_language)
    try:
        # force: silence the advice about tokenised text; predictions are scored as they are.
        return BLEU(tokenize=tokenizer, force=True)
    except RuntimeError as error:
        raise MetricUnavailableError(
            f"BLEU of a translation to target_language={target_language} needs sacreBLEU's tokenizer {tokenizer}: "
            f"pip install 'sacrebleu[{tokenizer.partition('-')[0]}]'"
        ) from error


def tokenize(text: str, target_language: str | None) -> list[str]:
    """Tokens of NLTK BLEU: every visible character in scripts without spaces, else runs of letters or punctuation."""
    # Importing NLTK takes seconds: with it come scikit-learn and pandas.
    from nltk.tokenize import wordpunct_tokenize

    return list("".join(text.split())) if by_character(target_language) else wordpunct_tokenize(text)


def bleu_n(predictions: Texts, references: References, order: int, target_language: str | None = None) -> Scores:
    """BLEU with uniform weights on 1..`order`-grams, 0..100, equal to NLTK's `corpus_bleu` without smoothing."""
    from nltk import __version__ as nltk_version
    from nltk.translate.bleu_score import closest_ref_length, modified_precision

    check_pairs(predictions, references)
    rows = []
    for prediction, accepted in zip(predictions, references, strict=True):
        hypothesis = tokenize(prediction, target_language)
        targets = [tokenize(reference, target_language) for reference in accepted]
        precisions = [modified_precision(targets, hypothesis, n) for n in range(1, order + 1)]
        lengths = [len(hypothesis), closest_ref_length(targets, len(hypothesis))]
        rows.append(lengths + [each.numerator for each in precisions] + [each.denominator for each in precisions])
    tokens = "char" if by_character(target_language) else "wordpunct"
    signature = f"order:{order}|case:mixed|tok:{tokens}|smooth:none|nltk:{nltk_version}"
    return Scores.corpus(rows, _nltk_bleu, signature)


def bleu(predictions: Texts, references: References, target_language: str | None = None) -> Scores:
    """sacreBLEU's BLEU-4, 0..100, with its tokenizer for the target language and exponential smoothing."""
    return _sacrebleu(load_bleu(target_language), _bleu, predictions, references)


def chrf(predictions: Texts, references: References) -> Scores:
    """sacreBLEU's chrF2 (character 1..6-grams, no words), 0..100."""
    return _sacrebleu(CHRF(), _chrf, predictions, references)


def _sacrebleu(metric: Metric, aggregate: Aggregate, predictions: Texts, references: References) -> Scores:
    check_pairs(predictions, references)
    # sacreBLEU wants one stream per reference position, None where an example has fewer.
    width = max(len(accepted) for accepted in references)
    streams: list[Any] = [[each[i] if i < len(each) else None for each in references] for i in range(width)]
    # As sacreBLEU's own significance tests do: its counts, summed, and the score of the sums.
    rows = metric._extract_corpus_statistics(list(predictions), streams)
    return Scores.corpus(rows, aggregate, str(metric.get_signature()))


def _nltk_bleu(sums: FloatArray) -> FloatArray:
    """BLEU [R] in 0..100 of sums [R, 2 + 2 · order]: lengths of hypotheses and references, matches, n-grams."""
    hypotheses, references = sums[:, 0], sums[:, 1]
    matches, totals = np.split(sums[:, 2:], 2, axis=1)
    precisions = np.where(matches > 0, matches / np.maximum(totals, 1), sys.float_info.min)
    with np.errstate(divide="ignore", invalid="ignore"):
        brevity = np.where(hypotheses < references, np.exp(1 - references / hypotheses), 1.0)
    scores = 100.0 * brevity * np.exp(np.log(precisions).mean(1))
    return np.where(matches[:, 0] > 0, scores, 0.0)


def _bleu(sums: FloatArray) -> FloatArray:
    """sacreBLEU's BLEU [R] of sums [R, 10], as for `_nltk_bleu`; orders without a match are left to its smoothing."""
    whole = np.trunc(sums)
    scores, plain = _nltk_bleu(whole), (whole[:, 2:6] > 0).all(1)
    library = BLEU()
    scores[~plain] = [library._compute_score_from_stats([int(x) for x in row]).score for row in whole[~plain]]
    return scores


def _chrf(sums: FloatArray) -> FloatArray:
    """sacreBLEU's chrF2 [R] of sums [R, 18]: n-grams of hypotheses, of references, and matches, order by order."""
    hypotheses, references, matches = (np.trunc(sums[:, first::3]) for first in range(3))
    there = (hypotheses > 0) & (references > 0)
    orders = np.maximum(there.sum(1), 1)
    precision, recall = (
        np.where(there, matches / np.maximum(counts, 1), 0.0).sum(1) / orders for counts in (hypotheses, references)
    )
    weighted = CHRF.BETA**2 * precision + recall
    return 100.0 * (1 + CHRF.BETA**2) * precision * recall / np.where(weighted > 0, weighted, 1.0)


#: How summed rows become scores, by metric. A table takes millions of resampled sums, for which the libraries' own
#: functions, one sum at a time, would need minutes.
SCORES_OF_SUMS = {"bleu1": _nltk_bleu, "bleu2": _nltk_bleu, "bleu": _bleu, "chrf": _chrf}
