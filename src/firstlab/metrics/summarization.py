"""Summarization metrics: ROUGE-1, ROUGE-L, ROUGE-Lsum and BERTScore."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from firstlab.metrics.scores import MetricUnavailableError, Scores, check_pairs
from firstlab.metrics.settings import BertScoreConfig

if TYPE_CHECKING:
    from bert_score import BERTScorer


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Scores]:
    """Mean F1 of ROUGE-1 ("rouge1"), ROUGE-L ("rougeL") and ROUGE-Lsum ("rougeLsum"), 0..100, best reference.

    ROUGE-L compares whole texts, ROUGE-Lsum line by line; CNN/DailyMail is usually reported with the latter.

    Computed by torchmetrics: it is maintained, while rouge-score, equal to it figure by figure, had its last
    release in 2022. Both lower-case, keep only a-z and 0-9, and do not stem here: text in other scripts scores 0.
    """
    from torchmetrics.functional.text import rouge_score  # slow to import

    check_pairs(predictions, references)
    best: dict[str, list[float]] = {"rouge1": [], "rougeL": [], "rougeLsum": []}
    for prediction, accepted in zip(predictions, references, strict=True):
        # One reference at a time: torchmetrics would choose the best by ROUGE-1 for every key.
        found = [rouge_score(prediction, reference, rouge_keys=("rouge1", "rougeL")) for reference in accepted]
        for key in ("rouge1", "rougeL"):
            best[key].append(100.0 * max(float(scores[f"{key}_fmeasure"]) for scores in found))
        best["rougeLsum"].append(100.0 * max(_rouge_lsum(prediction, reference) for reference in accepted))
    signature = f"f1|case:lc|tok:a-z0-9|stem:no|refs:max|torchmetrics:{version('torchmetrics')}"
    return {key: Scores.mean(values, signature) for key, values in best.items()}


def _rouge_lsum(prediction: str, reference: str) -> float:
    from torchmetrics.functional.text.rouge import _normalize_and_tokenize_text, _rouge_lsum_score

    # Lines are sentences, as in rouge-score; torchmetrics' public function would split them with NLTK's data.
    lines = ([_normalize_and_tokenize_text(line) for line in text.split("\n")] for text in (prediction, reference))
    return float(_rouge_lsum_score(*lines)["fmeasure"])


def bertscore(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    config: BertScoreConfig,
    device: str | None = None,
    batch_size: int = 64,
) -> Scores:
    """Mean BERTScore F1 (Zhang et al. 2020), 0..100, best reference; no idf weights, no rescaling.

    A blank text has no tokens to match: its F1 is 0 and the encoder never sees it.

    Args:
        predictions, references: As of every metric.
        config: The encoder.
        device: Torch device; None takes CUDA where there is one.
        batch_size: Texts per forward pass.

    Raises:
        ValueError: Empty or unpaired inputs, no encoder, or `num_layers` beyond the encoder's depth.
        MetricUnavailableError: The encoder is not there.
    """
    check_pairs(predictions, references)
    texts = [_encodable(prediction) for prediction in predictions]
    pairs = [
        (index, texts[index], _encodable(reference))
        for index, accepted in enumerate(references)
        for reference in accepted
        if texts[index] and _encodable(reference)
    ]
    path = config.path
    if path is None:
        raise ValueError("evaluation.bertscore.path is not set; give the hub id or folder of an encoder")
    scorer, num_layers = _load_scorer(path, config.num_layers, device)
    best: dict[int, float] = {}
    if pairs:
        candidates, targets = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
        _, _, found = scorer.score(candidates, targets, batch_size=batch_size)
        for (index, _, _), value in zip(pairs, found.tolist(), strict=True):
            best[index] = max(value, best.get(index, -1.0))

    name = Path(path).name if Path(path).is_dir() else path
    signature = f"f1|encoder:{name}|layer:{num_layers}|idf:no|rescale:no|refs:max|bert-score:{version('bert-score')}"
    return Scores.mean([100.0 * best.get(index, 0.0) for index in range(len(texts))], signature)


def _encodable(text: str) -> str:
    """`text` without surrounding white space and without lone surrogates, which no tokenizer accepts."""
    return text.encode("utf-8", errors="replace").decode("utf-8").strip()


class _NotT5(str):
    """The name of an encoder in which bert-score, which takes any path with "t5" in it for a T5 model, sees none."""

    __slots__ = ()

    def __contains__(self, part: object) -> bool:
        return part != "t5" and str(part) in str(self)


def _load_scorer(path: str, wanted: int | None, device: str | None) -> tuple[BERTScorer, int]:
    """The scorer and the layer it uses."""
    # Slow to import, and of use here alone.
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
        scorer = BERTScorer(model_type=name, num_layers=num_layers, device=device)
    except OSError as error:
        raise MetricUnavailableError(
            f"evaluation.bertscore.path={path!r} is no local encoder directory, is not in the hub cache and "
            "cannot be downloaded from here; give the directory of an encoder, or fetch it first with "
            f"`hf download {path}`"
        ) from error
    tokenizer = scorer._tokenizer
    positions = getattr(encoder, "max_position_embeddings", None)
    # Tokenizers saved without a maximum report a huge one, and long texts would overrun the position table.
    # RoBERTa's table has two entries more than it has positions.
    if positions and tokenizer.model_max_length > positions:
        tokenizer.model_max_length = positions - 2
    return scorer, num_layers
