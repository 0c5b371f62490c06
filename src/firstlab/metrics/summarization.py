"""Summarization metrics: ROUGE-1, ROUGE-L, ROUGE-Lsum and BERTScore."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from firstlab.metrics.scores import MetricUnavailableError, References, Scores, Texts, check_pairs

if TYPE_CHECKING:
    from bert_score import BERTScorer


@dataclass(frozen=True)
class BertScoreConfig:
    """Which encoder BERTScore of summaries compares with."""

    path: str | None = None  # hub id or folder; None leaves the metric out
    num_layers: int | None = None  # whose states are compared; None: bert-score's choice for the encoder, else the last

    def __post_init__(self) -> None:
        if self.num_layers is not None and self.num_layers < 1:
            raise ValueError(f"evaluation.bertscore.num_layers={self.num_layers} is not allowed: at least 1, or null")


def rouge(predictions: Texts, references: References) -> dict[str, Scores]:
    """Mean F1 of ROUGE-1 ("rouge1"), ROUGE-L ("rougeL") and ROUGE-Lsum ("rougeLsum"), 0..100, best reference.

    ROUGE-L compares whole texts, ROUGE-Lsum line by line; CNN/DailyMail is usually reported with the latter. Text is
    lower-cased, only a-z and 0-9 count, nothing is stemmed: text in other scripts scores 0.
    """
    # Slow to import. rouge-score gives the same figures, but is no longer maintained.
    from torchmetrics.functional.text import rouge_score
    from torchmetrics.functional.text.rouge import _normalize_and_tokenize_text, _rouge_lsum_score

    def by_line(text: str) -> list[Texts]:
        """Lines are sentences, as in rouge-score; torchmetrics' public function would split them with NLTK's data."""
        return [_normalize_and_tokenize_text(line) for line in text.split("\n")]

    check_pairs(predictions, references)
    best: dict[str, list[float]] = {"rouge1": [], "rougeL": [], "rougeLsum": []}
    for prediction, accepted in zip(predictions, references, strict=True):
        # One reference at a time: torchmetrics would choose the best by ROUGE-1 for every key.
        found = [rouge_score(prediction, reference, rouge_keys=("rouge1", "rougeL")) for reference in accepted]
        for key in ("rouge1", "rougeL"):
            best[key].append(100.0 * max(float(scores[f"{key}_fmeasure"]) for scores in found))
        lines = [_rouge_lsum_score(by_line(prediction), by_line(reference)) for reference in accepted]
        best["rougeLsum"].append(100.0 * max(float(scores["fmeasure"]) for scores in lines))
    signature = f"f1|case:lc|tok:a-z0-9|stem:no|refs:max|torchmetrics:{version('torchmetrics')}"
    return {key: Scores.mean(values, signature) for key, values in best.items()}


def bertscore(predictions: Texts, references: References, config: BertScoreConfig) -> Scores:
    """Mean BERTScore F1 (Zhang et al. 2020), 0..100, best reference, no idf, no rescaling; 0 for blank texts."""
    check_pairs(predictions, references)
    pairs = [
        (index, *texts)
        for index, accepted in enumerate(references)
        for reference in accepted
        if all(texts := (_encodable(predictions[index]), _encodable(reference)))
    ]
    path = config.path
    assert path is not None
    scorer, num_layers = _load_scorer(path, config.num_layers)
    best: dict[int, float] = {}
    if pairs:
        indices, candidates, targets = map(list, zip(*pairs, strict=True))
        for index, value in zip(indices, scorer.score(candidates, targets)[2].tolist(), strict=True):
            best[index] = max(value, best.get(index, -1.0))
    name = Path(path).name if Path(path).is_dir() else path
    signature = f"f1|encoder:{name}|layer:{num_layers}|idf:no|rescale:no|refs:max|bert-score:{version('bert-score')}"
    return Scores.mean([100.0 * best.get(index, 0.0) for index in range(len(predictions))], signature)


def _encodable(text: str) -> str:
    """The text without white space around it and lone surrogates, which no tokenizer accepts."""
    return text.encode("utf-8", errors="replace").decode("utf-8").strip()


class _NotT5(str):
    """The name of an encoder in which bert-score, which takes any path with "t5" in it for a T5 model, sees none."""

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return part != "t5" and str(part) in str(self)


def _load_scorer(path: str, wanted: int | None) -> tuple[BERTScorer, int]:
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    try:
        encoder = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if "/" in (kernel := str(getattr(encoder, "_attn_implementation", ""))):
            raise ValueError(f"evaluation.bertscore.path={path!r}: its config.json asks for code of the hub, {kernel}")
        depth: int = encoder.num_hidden_layers
        num_layers = wanted or model2layers.get(path, depth)
        if num_layers > depth:
            raise ValueError(f"evaluation.bertscore.num_layers={num_layers}: {path!r} has {depth} layers")
        name = path if "t5" in encoder.model_type else _NotT5(path)
        scorer = BERTScorer(model_type=name, num_layers=num_layers)
    except OSError as error:
        raise MetricUnavailableError(
            f"evaluation.bertscore.path={path!r} is neither an encoder's directory nor in the hub cache, and cannot be "
            f"downloaded from here; give a directory, or fetch it first with `hf download {path}`"
        ) from error
    tokenizer = scorer._tokenizer
    positions = getattr(encoder, "max_position_embeddings", None)
    # Tokenizers saved without a maximum report a huge one, and long texts would overrun the position table.
    # RoBERTa's table has two entries more than it has positions.
    if positions and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions - 2
    return scorer, num_layers
