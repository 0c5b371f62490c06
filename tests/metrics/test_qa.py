"""SQuAD v1.1 scores by hand and against torchmetrics' own port of the official script."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.text import squad

from firstlab.metrics.qa import answer_em, answer_f1, best_answer, normalize_answer


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower", "eiffel tower"),
        ("  an   apple,\n a day! ", "apple day"),
        ("theater", "theater"),
        ("U.S.A.", "usa"),
        ("don't", "dont"),
        ("the-a", "thea"),  # punctuation goes before articles
        ("rock-and-roll", "rockandroll"),
        ("$5,000", "5000"),
        ("The", ""),
        ("A «quoted» word", "«quoted» word"),  # only ASCII punctuation goes
        ("İstanbul", "i̇stanbul"),
        ("", ""),
    ],
)
def test_normalisation(text, normal):
    assert normalize_answer(text) == normal


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "score"),
    [
        ("the Denver Broncos", "Denver Broncos", 1, 1),
        ("Denver", "Denver Broncos", 0, 2 / 3),
        ("in Denver, in Denver", "Denver", 0, 2 / 5),
        ("Paris", "London", 0, 0),
        ("", "London", 0, 0),
        ("The", "a", 1, 0),  # both empty once normalised: v1.1 gives an exact match and no overlap
    ],
)
def test_one_answer(prediction, answer, em, score):
    assert answer_em(prediction, answer) == em
    assert answer_f1(prediction, answer) == pytest.approx(score)


def test_best_of_several_answers_counts():
    predictions = ["Super Bowl 50", "gold"]
    references = [("Super Bowl", "Super Bowl 50."), ("golden", "the gold medal")]
    assert best_answer(answer_em, predictions, references).per_example == [100.0, 0.0]
    assert best_answer(answer_f1, predictions, references).per_example == pytest.approx([100.0, 100 * 2 / 3])
    assert best_answer(answer_f1, predictions, references).value == pytest.approx(100 * 5 / 6)


TEXT = st.text(alphabet="ab the,.'-\n é猫", max_size=14)
# torchmetrics gives two empty answers an F1 of 1, which is v2.0's rule; v1.1 has no empty answers.
ANSWER = TEXT.filter(normalize_answer)


@given(st.lists(st.tuples(TEXT, st.lists(ANSWER, min_size=1, max_size=3)), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_equals_torchmetrics(pairs):
    predictions, references = [p for p, _ in pairs], [tuple(r) for _, r in pairs]
    library = squad(
        [{"prediction_text": p, "id": str(i)} for i, p in enumerate(predictions)],
        [{"answers": {"answer_start": [0] * len(r), "text": list(r)}, "id": str(i)} for i, r in enumerate(references)],
    )
    for score, name in ((answer_em, "exact_match"), (answer_f1, "f1")):
        ours = best_answer(score, predictions, references).value
        assert ours == pytest.approx(float(library[name]), abs=1e-4)


def test_bad_inputs():
    for score in (answer_em, answer_f1):
        with pytest.raises(ValueError, match="nothing to score"):
            best_answer(score, [], [])
        with pytest.raises(ValueError, match=r"references\[1\] is empty"):
            best_answer(score, ["a", "b"], [("a",), ()])
