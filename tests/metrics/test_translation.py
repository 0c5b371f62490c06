"""NLTK BLEU against NLTK itself, sacreBLEU against its published example and its own corpus scores."""

import warnings
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu
from sacrebleu.metrics import BLEU, CHRF

from firstlab.metrics.scores import MetricUnavailableError
from firstlab.metrics.translation import SCORES_OF_SUMS, bleu, bleu_n, bleu_tokenizer, chrf, tokenize

# The example of sacreBLEU's README: three segments with two references each, BLEU 48.53 and chrF2 59.73.
PREDICTIONS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ("The dog bit the man.", "The dog had bit the man."),
    ("It was not unexpected.", "No one was surprised."),
    ("The man bit him first.", "The man had bitten the dog."),
]

TEXT = st.text(alphabet="ab äß猫狗。.\n\t\u2028\u0301", max_size=12)
PAIRS = st.lists(st.tuples(TEXT, st.lists(TEXT, min_size=1, max_size=3).map(tuple)), min_size=1, max_size=5)


def nltk_bleu(predictions, references, order, language):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK warns where an order has no match
        return 100 * corpus_bleu(
            [[tokenize(text, language) for text in accepted] for accepted in references],
            [tokenize(text, language) for text in predictions],
            weights=(1.0,) if order == 1 else (0.5, 0.5),
        )


@pytest.mark.parametrize(
    ("text", "language", "tokens"),
    [
        ("Don't go, Käthe!", "de", ["Don", "'", "t", "go", ",", "Käthe", "!"]),
        ("one\ntwo\u2028 three", None, ["one", "two", "three"]),
        ("我有 2 只猫。\n", "zh", ["我", "有", "2", "只", "猫", "。"]),
        ("猫狗", "zh-CN", ["猫", "狗"]),
        ("犬は 猫", "ja", ["犬", "は", "猫"]),
        ("ขาว", "tha_Thai", ["ข", "า", "ว"]),
        ("개와 고양이", "ko-KR", ["개와", "고양이"]),
        ("猫狗", "de", ["猫狗"]),
        ("", "zh", []),
    ],
)
def test_tokens(text, language, tokens):
    assert tokenize(text, language) == tokens


def test_bleu_1_by_hand():
    # 3 of 4 words match; the hypothesis is as long as the reference: 75. One of 3 pairs matches too: sqrt(3/4 · 1/3).
    scores = [bleu_n(["a b c x"], [("b c a y",)], order) for order in (1, 2)]
    assert scores[0].value == pytest.approx(75.0)
    assert scores[1].value == pytest.approx(50.0)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("language", ["de", "zh"])
def test_bleu_n_is_nltks(order, language):
    expected = nltk_bleu(PREDICTIONS, REFERENCES, order, language)
    assert 10 < expected < 100
    assert bleu_n(PREDICTIONS, REFERENCES, order, language).value == pytest.approx(expected, rel=1e-12)


@given(PAIRS, st.sampled_from(["de", "zh"]))
@settings(max_examples=60, deadline=None)
def test_every_metric_is_its_librarys_on_any_text(pairs, language):
    predictions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for order in (1, 2):
        expected = nltk_bleu(predictions, references, order, language)
        assert bleu_n(predictions, references, order, language).value == pytest.approx(expected, abs=1e-9)

    width = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(width)]
    library = BLEU(tokenize="zh" if language == "zh" else "13a", force=True).corpus_score(predictions, streams)
    assert bleu(predictions, references, language).value == pytest.approx(library.score, abs=1e-9)
    library = CHRF().corpus_score(predictions, streams)
    assert chrf(predictions, references).value == pytest.approx(library.score, abs=1e-9)


COUNT = st.integers(0, 9)
BLEU_SUMS = st.builds(
    lambda lengths, counts: [*lengths, *(min(pair) for pair in counts), *(pair[1] for pair in counts)],
    st.tuples(COUNT, COUNT),
    st.lists(st.tuples(COUNT, COUNT), min_size=4, max_size=4),
)
CHRF_SUMS = st.lists(st.tuples(COUNT, COUNT, COUNT), min_size=6, max_size=6).map(
    lambda orders: [count for hyp, ref, match in orders for count in (hyp, ref, min(hyp, ref, match))]
)


@given(st.lists(BLEU_SUMS, min_size=1, max_size=6), st.lists(CHRF_SUMS, min_size=1, max_size=6))
def test_scores_of_many_sums_are_those_of_the_library_one_by_one(bleu_sums, chrf_sums):
    for metric, name, sums in ((BLEU(), "bleu", bleu_sums), (CHRF(), "chrf", chrf_sums)):
        expected = [metric._compute_score_from_stats(list(row)).score for row in sums]
        assert SCORES_OF_SUMS[name](np.array(sums, dtype=float)) == pytest.approx(expected, abs=1e-9)


def test_sacrebleu_known_values_and_signatures():
    ours = bleu(PREDICTIONS, REFERENCES, "de")
    assert ours.value == pytest.approx(48.53, abs=0.005)
    assert ours.signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "tok:zh" in bleu(PREDICTIONS, REFERENCES, "zh_Hans").signature
    ours = chrf(PREDICTIONS, REFERENCES)
    assert ours.value == pytest.approx(59.73, abs=0.005)
    assert ours.signature.startswith("nrefs:2|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert "nrefs:var" in bleu(["a", "b"], [("a",), ("b", "c")]).signature


def test_nltk_signature_names_what_matters():
    assert bleu_n(["a"], [("a",)], 2, "zh").signature.startswith("order:2|case:mixed|tok:char|smooth:none|nltk:")
    assert "|tok:wordpunct|" in bleu_n(["a"], [("a",)], 1, "de").signature


def test_chinese_counts_characters():
    assert bleu_n(["我有一只猫"], [("我有一只狗",)], 1, "zh").value == pytest.approx(80.0)
    assert bleu_n(["我有一只猫"], [("我有一只狗",)], 1, "de").value == 0.0


@pytest.mark.parametrize(
    ("tags", "tokenizer"),
    [
        ([None, "de", "pt_BR", "sr-Latn", "mn"], "13a"),
        (["zh", "zh-CN", "ZH_Hant_TW", "zho_Hans", "cmn", "yue-HK"], "zh"),
        (["ja", "ja-JP", "jpn_Jpan"], "ja-mecab"),
        (["ko", "ko_KR", "kor_Hang"], "ko-mecab"),
        (["th", "th-TH", "khm_Khmr", "lo", "my", "bo", "dz"], "char"),
    ],
)
def test_tags_decide_the_tokenizer(tags, tokenizer):
    assert {bleu_tokenizer(tag) for tag in tags} == {tokenizer}


@pytest.mark.parametrize(
    ("language", "package", "text"),
    [
        ("ja-JP", "MeCab", "赤い家は古い川のそばにある。"),
        ("ko", "mecab_ko", "빨간 집은 강가에 있다."),
        ("th", None, "บ้านสีแดงอยู่ริมแม่น้ำ"),
        ("km", None, "ផ្ទះក្រហម"),
        ("my_MM", None, "အိမ်နီ"),
        ("zh-Hant", None, "紅房子在老河邊。"),
    ],
)
def test_identical_sentences_of_unspaced_scripts(language, package, text, monkeypatch):
    if package is None or find_spec(package):
        scores = [bleu([text] * 3, [(text,)] * 3, language), bleu_n([text] * 3, [(text,)] * 3, 2, language)]
        assert [each.value for each in scores] == pytest.approx([100.0, 100.0])
    if package is not None:
        monkeypatch.setattr(f"sacrebleu.tokenizers.tokenizer_{language[:2]}_mecab.MeCab", None)
        message = rf"target_language={language} needs .*-mecab: pip install 'sacrebleu\[{language[:2]}\]'"
        with pytest.raises(MetricUnavailableError, match=message):
            bleu([text], [(text,)], language)


def test_perfect_empty_and_disjoint():
    text = ["Ein Hund läuft über die Wiese ."]
    for score in (bleu_n(text, [tuple(text)], 2), bleu(text, [tuple(text)]), chrf(text, [tuple(text)])):
        assert score.value == pytest.approx(100.0)
    for prediction in ("", "\n", "xyz"):
        pair = ([prediction], [("a b",)])
        for score in (bleu_n(*pair, 2), bleu(*pair), chrf(*pair)):
            assert score.value == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("metric", [bleu, chrf, lambda p, r: bleu_n(p, r, 1)])
def test_bad_inputs(metric):
    with pytest.raises(ValueError, match="nothing to score"):
        metric([], [])
    with pytest.raises(ValueError, match="1 predictions but 2 references"):
        metric(["a"], [("a",), ("b",)])
    with pytest.raises(ValueError, match=r"references\[0\] is empty"):
        metric(["a"], [()])
    with pytest.raises(ValueError, match=r"references\[0\] is a string"):
        metric(["a"], ["a"])
