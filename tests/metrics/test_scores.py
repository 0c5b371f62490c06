"""Intervals and tests against closed forms, exhaustive enumeration and sacreBLEU's own significance tests."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.metrics.scores import Scores, bootstrap_interval, paired_test, perplexity
from firstlab.metrics.translation import bleu, chrf

VALUES = st.lists(st.floats(0, 100), min_size=1, max_size=8)


def normal_scores(n, mean, seed):
    return Scores.mean(np.random.default_rng(seed).normal(mean, 10, n).tolist())


def sentences(n, seed):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(list("abcdef"), size=8)) for _ in range(n)]


def test_mean_interval_agrees_with_the_normal_approximation():
    scores = normal_scores(400, 50, seed=1)
    error = np.std(scores.per_example) / np.sqrt(400)
    low, high = bootstrap_interval(scores, resamples=4000, seed=3)
    assert low == pytest.approx(scores.value - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(scores.value + 1.96 * error, abs=0.1 * error)
    narrow = bootstrap_interval(scores, confidence=0.5, resamples=4000, seed=3)
    assert low < narrow[0] < narrow[1] < high


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        low, high = bootstrap_interval(normal_scores(50, 30, seed), confidence=0.9, resamples=300, seed=seed)
        covered += low <= 30 <= high
    assert 165 <= covered <= 195


@given(VALUES, st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_interval_lies_within_the_data_and_repeats(values, seed):
    scores = Scores.mean(values)
    low, high = bootstrap_interval(scores, resamples=50, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == bootstrap_interval(scores, resamples=50, seed=seed)


def test_chunks_do_not_change_the_interval(monkeypatch):
    scores = normal_scores(20, 50, seed=0)
    whole = bootstrap_interval(scores, resamples=30)
    monkeypatch.setattr("firstlab.metrics.scores._CHUNK", 7 * 20)
    assert bootstrap_interval(scores, resamples=30) == pytest.approx(whole)


def test_one_example_and_equal_examples_have_no_spread():
    for scores in (Scores.mean([37.5]), Scores.mean([37.5] * 9)):
        assert bootstrap_interval(scores, resamples=20) == pytest.approx((37.5, 37.5))
    one = bleu(["a b c d e"], [("a b c d f",)])
    assert bootstrap_interval(one, resamples=20) == pytest.approx((one.value, one.value))


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_a_resample_of_a_corpus_metric_is_the_score_of_the_resampled_corpus(metric):
    predictions, references = sentences(6, 0), [(text,) for text in sentences(6, 1)]
    scores = metric(predictions, references)
    counts = np.array([2, 0, 1, 0, 3, 0])
    chosen = np.repeat(np.arange(6), counts)
    expected = metric([predictions[i] for i in chosen], [references[i] for i in chosen]).value
    assert scores.aggregate((counts @ scores.rows)[None])[0] == pytest.approx(expected, abs=1e-9)


def test_corpus_interval_agrees_with_sacrebleus_bootstrap():
    from sacrebleu.metrics import BLEU

    predictions, references = sentences(150, 0), sentences(150, 1)
    library = BLEU(force=True).corpus_score(predictions, [references], n_bootstrap=2000)
    low, high = bootstrap_interval(bleu(predictions, [(text,) for text in references]), resamples=2000)
    assert (low + high) / 2 == pytest.approx(library._mean, abs=0.3)
    assert (high - low) / 2 == pytest.approx(library._ci, rel=0.1)


def test_p_value_agrees_with_all_sign_flips():
    a, b = [60.0, 55, 71, 42, 66, 58, 49, 73], [52.0, 57, 60, 41, 55, 59, 40, 65]
    differences = np.subtract(a, b)
    flips = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=8)]
    exact = np.mean(np.array(flips) >= abs(differences.sum()) - 1e-9)
    found = paired_test(Scores.mean(a), Scores.mean(b), resamples=20_000, seed=1)
    assert found.difference == pytest.approx(differences.mean())
    assert found.p_value == pytest.approx(exact, abs=0.006)


def test_difference_interval_agrees_with_the_normal_approximation():
    a, b = normal_scores(300, 50, seed=1), normal_scores(300, 48, seed=2)
    differences = np.subtract(a.per_example, b.per_example)
    error = differences.std() / np.sqrt(300)
    found = paired_test(a, b, resamples=4000)
    assert found.low == pytest.approx(differences.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(differences.mean() + 1.96 * error, abs=0.15 * error)


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_corpus_p_value_agrees_with_sacrebleus(metric):
    from sacrebleu.metrics import BLEU, CHRF
    from sacrebleu.significance import PairedTest as SacreTest

    references = sentences(60, 0)
    # A repeats half the references' words in place, B a few less: close enough for a p-value well inside (0, 1).
    words = [text.split() for text in references]
    a = [" ".join(word if (i + j) % 4 else "x" for j, word in enumerate(text)) for i, text in enumerate(words)]
    b = [" ".join(word if (i * j) % 5 else "x" for j, word in enumerate(text)) for i, text in enumerate(words)]
    name = "BLEU" if metric is bleu else "chrF2"
    library = SacreTest(
        [("b", b), ("a", a)], {name: BLEU(force=True) if metric is bleu else CHRF()}, [references], "ar", n_samples=3000
    )()[1][name][1]
    pairs = [(text,) for text in references]
    found = paired_test(metric(a, pairs), metric(b, pairs), resamples=3000)
    assert found.p_value == pytest.approx(library.p_value, abs=0.04)


def test_clear_gap_no_gap_and_one_example():
    a = Scores.mean([80.0, 82, 79, 85, 90, 77, 81, 88, 84, 83])
    b = Scores.mean([10.0, 12, 9, 15, 20, 7, 11, 18, 14, 13])
    gap = paired_test(a, b)
    assert gap.p_value < 0.01 and gap.low > 0
    back = paired_test(b, a)
    assert back.difference == -gap.difference and back.high < 0
    same = paired_test(a, a)
    assert (same.difference, same.p_value, same.low, same.high) == (0, 1, 0, 0)
    single = paired_test(Scores.mean([90.0]), Scores.mean([10.0]))
    assert single.p_value == 1 and single.low == single.high == single.difference == 80


def test_false_alarms_are_as_rare_as_the_level_says():
    alarms = sum(
        paired_test(normal_scores(25, 50, 2 * seed), normal_scores(25, 50, 2 * seed + 1), resamples=200).p_value <= 0.1
        for seed in range(200)
    )
    assert 8 <= alarms <= 34


@given(VALUES, st.data())
@settings(max_examples=30, deadline=None)
def test_p_value_is_a_probability_and_symmetric(values, data):
    other = data.draw(st.lists(st.floats(0, 100), min_size=len(values), max_size=len(values)))
    a, b = Scores.mean(values), Scores.mean(other)
    forth, back = paired_test(a, b, resamples=60), paired_test(b, a, resamples=60)
    assert 0 < forth.p_value <= 1
    assert forth.p_value == back.p_value
    assert (forth.difference, forth.low) == pytest.approx((-back.difference, -back.high), abs=1e-9)


def test_bad_inputs():
    scores = Scores.mean([1.0, 2.0])
    with pytest.raises(ValueError, match="at least one example"):
        Scores.mean([])
    with pytest.raises(ValueError, match="example 1 is not finite"):
        Scores.mean([1.0, float("nan")])
    with pytest.raises(ValueError, match="A has 2, B has 1"):
        paired_test(scores, Scores.mean([1.0]))


def test_perplexity():
    assert perplexity(10 * np.log(7.0), 10) == pytest.approx(7.0)
    assert perplexity(0.0, 3) == 1.0
    assert perplexity(1e9, 1) == float("inf")
    with pytest.raises(ValueError, match="token_count=0"):
        perplexity(1.0, 0)
    with pytest.raises(ValueError, match="NaN"):
        perplexity(float("nan"), 1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_blend_is_what_halves_of_both_systems_give(share):
    references = [("the old farmer sees a dog",), ("a small red house",)] * 2
    a = bleu(["the old farmer sees a dog", "a house that is small"] * 2, references)
    b = bleu(["an old farmer saw dogs there", "a small red house"] * 2, references)
    # Every sentence is there twice, so that a half of the examples can hold each of them once.
    taken = round(4 * share)
    mixed = Scores.corpus(np.concatenate([b.rows[:taken], a.rows[taken:]]), a.aggregate)
    assert Scores.blend(a, b, share).value == pytest.approx(mixed.value)
    with pytest.raises(ValueError, match=r"sizes: \[4, 2\]"):
        Scores.blend(a, bleu(["x", "y"], references[:2]), share)


def test_a_mixture_is_the_mean_of_its_parts_and_resampled_as_one():
    first, second = normal_scores(40, 60, 0), bleu(sentences(8, 0), [(text,) for text in sentences(8, 1)])
    mixture = Scores.mixture([first, second])
    assert len(mixture) == 48 and mixture.value == pytest.approx((first.value + second.value) / 2)
    moved = Scores.mixture([Scores.mean([value + 5 for value in first.per_example]), second])
    assert paired_test(moved, mixture, resamples=200).difference == pytest.approx(2.5)
    low, high = bootstrap_interval(Scores.mixture([first, first]), resamples=2000)
    alone = bootstrap_interval(first, resamples=2000)
    assert high - low == pytest.approx((alone[1] - alone[0]) / np.sqrt(2), rel=0.15)
