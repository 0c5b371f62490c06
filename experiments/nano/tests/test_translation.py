"""Generated sentences: inflection checked by hand, splits and determinism."""

import hashlib

import pytest

from recipe.translation import GeneratedTranslation, chinese, english, german, lexicon
from recipe.translation.meaning import NP, PP, Clause, Joined
from recipe.translation.phrase_sampler import number_words

NOUNS = {noun.en: noun for noun in lexicon.NOUNS}
NOUNS |= {place.noun.en: place.noun for place in lexicon.PLACES}
VERBS = {verb.en: verb for verb in lexicon.TRANSITIVE}
MOTION = {verb.en: verb for verb in lexicon.MOTION}
TIMES = {time.en: time for time in lexicon.TIMES}


def adjective(en, tag="t"):
    return next(a for a in lexicon.ADJECTIVES if a.en == en and tag in a.tags)


def np(en, det="def", plural=False, *adjectives, **rest):
    return NP(NOUNS[en], det, plural, tuple(adjectives), **rest)


def named(en):
    name = next(name for name in lexicon.NAMES if name[0] == en)
    return NP(name=lexicon.Phrase(en, en, name[2]), det="", gender=name[1])


@pytest.mark.parametrize(
    ("phrase", "case", "expected"),
    [
        (np("lamp", "def", False, adjective("new")), "dat", "der neuen Lampe"),
        (np("book", "indef", False, adjective("old", "r")), "nom", "ein altes Buch"),
        (np("suitcase", "indef", False, adjective("expensive")), "acc", "einen teuren Koffer"),
        (np("coffee", "bare", False, adjective("hot", "d")), "acc", "heißen Kaffee"),
        (np("house", "bare", True, adjective("dark", "h")), "dat", "dunklen Häusern"),
        (np("student"), "gen", "des Studenten"),
        (np("farmer", "indef"), "dat", "einem Bauern"),
        (np("man"), "gen", "des Mannes"),
        (np("teacher", "def", True), "dat", "den Lehrern"),
        (np("car", "this", True), "dat", "diesen Autos"),
        (np("picture", "we", False, adjective("beautiful")), "acc", "unser schönes Bild"),
        (np("bag", "he", True, adjective("heavy")), "nom", "seine schweren Taschen"),
        (np("dog", "some", True, adjective("brave", "a")), "dat", "einigen mutigen Hunden"),
        (np("bicycle", owner=np("neighbor")), "nom", "das Fahrrad des Nachbarn"),
        (np("key", owner=named("Anna")), "acc", "Annas Schlüssel"),
    ],
)
def test_german_noun_phrases(phrase, case, expected):
    assert german.noun_phrase(phrase, case) == expected


BUY = Clause(np("teacher"), VERBS["buy"], "past", obj=np("book", "indef"))
VISIT = Clause(np("woman"), VERBS["visit"], "past", obj=np("doctor", "def", False), gap="object")
STORY = [
    (BUY, "The teacher bought a book.", "Der Lehrer kaufte ein Buch.", "老师买了一本书。"),
    (
        Clause(np("teacher"), VERBS["buy"], "perf", obj=np("book", "indef"), negated=True),
        "The teacher has not bought a book yet.",
        "Der Lehrer hat noch kein Buch gekauft.",
        "老师还没买书。",
    ),
    (
        Clause(np("boy"), VERBS["turn on"], "past", obj=np("lamp"), time=TIMES["yesterday"], front=True),
        "Yesterday, the boy turned on the lamp.",
        "Gestern schaltete der Junge die Lampe ein.",
        "昨天，男孩打开了灯。",
    ),
    (
        Clause(np("boy"), VERBS["turn on"], "wants", obj=np("lamp"), negated=True),
        "The boy does not want to turn on the lamp.",
        "Der Junge will die Lampe nicht einschalten.",
        "男孩不想打开灯。",
    ),
    (
        Clause(NP(pronoun="I", det=""), VERBS["help"], "pres", obj=np("child", "def", True)),
        "I help the children.",
        "Ich helfe den Kindern.",
        "我帮助孩子们。",
    ),
    (
        Clause(named("Peter"), VERBS["pick up"], "past", obj=NP(pronoun="she", det="", gender="f")),
        "Peter picked her up.",
        "Peter holte sie ab.",
        "彼得接了她。",
    ),
    (
        Clause(
            np("woman"),
            next(verb for verb in lexicon.PUT if verb.de == "legen"),
            "past",
            obj=np("newspaper"),
            direction=PP("on", "auf", "acc", "上", np("table")),
        ),
        "The woman put the newspaper on the table.",
        "Die Frau legte die Zeitung auf den Tisch.",
        "女人把报纸放在了桌子上。",
    ),
    (
        Clause(
            np("cook"),
            next(verb for verb in lexicon.DITRANSITIVE if verb.en == "give"),
            "past",
            obj=np("key"),
            recipient=np("colleague"),
        ),
        "The cook gave the colleague the key.",
        "Der Koch gab dem Kollegen den Schlüssel.",
        "厨师给了同事钥匙。",
    ),
    (
        Clause(
            np("tourist"),
            MOTION["go"],
            "perf",
            direction=PP("to", "zu", "dat", "", np("station")),
            already=True,
        ),
        "The tourist has already gone to the station.",
        "Der Tourist ist schon zum Bahnhof gegangen.",
        "游客已经去了火车站。",
    ),
    (
        Clause(
            np("doctor", relative=VISIT),
            VERBS["read"],
            "pres",
            obj=np("letter", "count", True, count=number_words(2)),
        ),
        "The doctor that the woman visited reads two letters.",
        "Der Arzt, den die Frau besuchte, liest zwei Briefe.",
        "女人拜访的医生读两封信。",
    ),
    (
        Clause(np("man"), next(verb for verb in lexicon.SAY if verb.en == "say"), "past", content=BUY),
        "The man said that the teacher bought a book.",
        "Der Mann sagte, dass der Lehrer ein Buch kaufte.",
        "男人说老师买了一本书。",
    ),
    (
        Joined(
            Clause(np("waiter"), VERBS["close"], "past", obj=np("window")),
            "because",
            Clause(tense="past", weather=tuple(lexicon.WEATHER[0])),
            first=True,
        ),
        "Because it was raining, the waiter closed the window.",
        "Weil es regnete, machte der Kellner das Fenster zu.",
        "因为正在下雨，所以服务员关上了窗户。",
    ),
    (
        Clause(NP(pronoun="they", det=""), VERBS["close"], "past", obj=np("door"), negated=True),
        "They did not close the door.",
        "Sie machten die Tür nicht zu.",
        "他们没关上门。",
    ),
]


@pytest.mark.parametrize(("sentence", "en", "de", "zh"), STORY, ids=[row[1] for row in STORY])
def test_sentences(sentence, en, de, zh):
    assert (english.write(sentence), german.write(sentence), chinese.write(sentence)) == (en, de, zh)


def test_numbers():
    assert [chinese.number(n) for n in (10, 12, 20, 35)] == ["十", "十二", "二十", "三十五"]
    assert (number_words(2).zh, number_words(21).de, number_words(87).en) == (
        "两",
        "einundzwanzig",
        "eighty-seven",
    )
    assert (number_words(16).de, number_words(30).de, number_words(12).en) == (
        "sechzehn",
        "dreißig",
        "twelve",
    )


@pytest.mark.parametrize("pair", ["en-de", "en-zh"])
def test_splits_are_disjoint_unique_and_cover_all_levels(pair):
    task = GeneratedTranslation(pair, pool_size=600, test_size=60)
    pool, test = task.train_pool(), task.test()
    more = task.generate(600, seed=9)
    assert not {e.source for e in pool + more} & {e.source for e in test}
    for examples in (pool, test):
        assert len({e.source for e in examples}) == len(examples)
        assert {e.difficulty for e in examples} == {1, 2, 3, 4, 5}
    assert test[12].id == f"mini-{pair.replace('-', '')}-test-000012"
    assert all(3 <= len(e.source.split()) <= 30 for e in pool)


def test_same_everywhere():
    digest = hashlib.sha256()
    for pair in ("en-de", "en-zh"):
        for example in GeneratedTranslation(pair, pool_size=200).train_pool():
            digest.update(f"{example.id}\t{example.source}\t{example.references[0]}\n".encode())
    assert digest.hexdigest()[:16] == "6badb0a2e446bbe9"


def test_test_set_does_not_depend_on_the_seed():
    assert GeneratedTranslation(test_size=10, seed=1).test() == GeneratedTranslation(test_size=20, seed=2).test()[:10]


def test_english_decides_the_translation():
    targets: dict[str, str] = {}
    for seed in range(4):
        for example in GeneratedTranslation("en-de").generate(800, seed):
            assert targets.setdefault(example.source, example.references[0]) == example.references[0]


def test_targets_are_clean():
    for pair in ("en-de", "en-zh"):
        for example in GeneratedTranslation(pair).generate(500, seed=3):
            target = example.references[0]
            assert not any(mark in target for mark in ("@", "{", "  ", " ,", ",,", "None"))
            assert pair == "en-de" or (" " not in target and not any("a" <= c.lower() <= "z" for c in target))


@pytest.mark.parametrize("options", [{"pair": "en-fr"}, {"pool_size": 0}, {"test_size": 0}])
def test_wrong_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        GeneratedTranslation(**options)
