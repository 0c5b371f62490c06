"""Exact match and F1 of extractive QA, as in SQuAD v1.1's evaluation (Rajpurkar et al. 2016)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from firstlab.metrics.scores import References, Scores, Texts, check_pairs

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SIGNATURE = "squad:1.1|case:lc|refs:max"


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, then English articles, then surplus white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def answer_em(prediction: str, answer: str) -> float:
    """1 where both are equal once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def answer_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of token precision and recall, 0..1; 0 without a common token, as v1.1 has it."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    return 2.0 * common / (len(predicted) + len(expected)) if common else 0.0


def best_answer(score: Callable[[str, str], float], predictions: Texts, references: References) -> Scores:
    """Mean score (`answer_em` or `answer_f1`) against the closest accepted answer, 0..100."""
    check_pairs(predictions, references)
    best = [
        100.0 * max(score(prediction, answer) for answer in accepted)
        for prediction, accepted in zip(predictions, references, strict=True)
    ]
    return Scores.mean(best, _SIGNATURE)
