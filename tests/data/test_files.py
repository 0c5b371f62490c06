import gzip
import json
import lzma
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlab.data.files import (
    clean_text,
    data_files,
    entries,
    has_text,
    load_hub_split,
    members,
    read_json,
    read_jsonl,
    read_lines,
    read_parallel,
    spread,
)


def raises(*parts: object):
    """A `ValueError` whose text holds `parts` in this order."""
    return pytest.raises(ValueError, match=".*".join(re.escape(str(part)) for part in parts))


def test_only_newlines_end_a_line(tmp_path):
    odd = ["a\u2028b", "c\u0085d", "e\x0bf\x0cg", "h\u2029\x1ci"]
    path = tmp_path / "text"
    path.write_bytes(("\ufeff" + "\r\n".join(odd) + "\r\n").encode())
    assert read_lines(path) == odd


def test_a_missing_final_newline_loses_no_line(tmp_path):
    path = tmp_path / "text"
    path.write_text("one\ntwo", encoding="utf-8")
    assert read_lines(path) == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n"])
def test_an_empty_file_is_named(tmp_path, content):
    (tmp_path / "text").write_bytes(content)
    with raises(tmp_path / "text", "empty"):
        read_lines(tmp_path / "text")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_other_encodings_are_named_with_their_line(tmp_path, mark):
    (tmp_path / "text").write_bytes(mark + "eins\nzwei\ndrei ö".encode("latin-1"))
    with raises(tmp_path / "text", "line 3", "UTF-8"):
        read_lines(tmp_path / "text")


def test_parallel_lines_stay_together(tmp_path):
    source, reference = tmp_path / "a.en", tmp_path / "a.de"
    source.write_bytes("one\u2028more \r\n two\r\n".encode())
    reference.write_bytes("\ufeffeins\nzwei 🏠".encode())
    assert read_parallel(source, reference) == [(1, "one\u2028more", "eins"), (2, "two", "zwei 🏠")]


def test_parallel_text_of_different_length(tmp_path):
    (tmp_path / "a.en").write_text("1\n2\n3\n", encoding="utf-8")
    (tmp_path / "a.de").write_text("1\n2\n", encoding="utf-8")
    with raises("a.en has 3 lines", "a.de has 2", "line 3 has no counterpart"):
        read_parallel(tmp_path / "a.en", tmp_path / "a.de")


@pytest.mark.parametrize(("empty", "what"), [("a.en", "source sentence"), ("a.de", "reference sentence")])
@pytest.mark.parametrize("line", ["", "\u3000 ", "\u200b\u2060", "\ufeff", "\u200e\u00ad \u200d"])
def test_an_empty_line_is_named_or_left_out(tmp_path, capsys, empty, what, line):
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text(f"1\n{line}\n3\n" if name == empty else "1\n2\n3\n", encoding="utf-8")
    with raises(tmp_path / empty, "line 2", what, "is empty", "data.task.drop_empty=true"):
        read_parallel(tmp_path / "a.en", tmp_path / "a.de")
    assert read_parallel(tmp_path / "a.en", tmp_path / "a.de", drop_empty=True) == [(1, "1", "1"), (3, "3", "3")]
    assert "left out 1 of 3 pairs" in capsys.readouterr().err


def test_joined_files_keep_no_byte_order_marks(tmp_path):
    (tmp_path / "a").write_bytes(("\ufeffone\n" + "\ufefftwo" + "\ufeff three\n").encode())
    assert read_lines(tmp_path / "a") == ["one", "two three"]
    (tmp_path / "b").write_bytes('\ufeff{"a": 1}\n\ufeff{"a": "\\ufeffx"}\n'.encode())
    assert read_jsonl(tmp_path / "b") == [{"a": 1}, {"a": "\ufeffx"}]
    assert clean_text("\ufeffx", "b, line 2", "text") == "x"


@pytest.mark.parametrize(
    ("text", "seen"), [("", False), (" \t\u200b\u2063", False), ("\u200bx", True), ("。", True), ("🏠", True)]
)
def test_what_there_is_to_see(text, seen):
    assert has_text(text) is seen


def test_packed_files(tmp_path):
    (tmp_path / "a.en.gz").write_bytes(gzip.compress(b"eins\nzwei\n"))
    (path,) = data_files(str(tmp_path), ["a.en"])
    assert read_lines(path) == ["eins", "zwei"]
    (tmp_path / "b.en").write_bytes(path.read_bytes()[:-9])
    with raises(tmp_path / "b.en", "the gzip file is damaged"):
        read_lines(tmp_path / "b.en")
    (tmp_path / "c.en").write_bytes(lzma.compress(b"eins"))
    with raises(tmp_path / "c.en", "line 1: not UTF-8", "unpack it or use gzip"):
        read_lines(tmp_path / "c.en")


def test_missing_files_and_what_is_there(tmp_path):
    (tmp_path / "train.en").touch()
    with raises(
        f"data.root={tmp_path} lacks train.de of the expected train.en, train.de; the directory holds train.en"
    ):
        data_files(str(tmp_path), ["train.en", "train.de"])
    assert data_files(str(tmp_path), ["train.en"]) == [tmp_path / "train.en"]


def test_a_full_directory_is_not_listed_whole(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02}").touch()
    with raises("holds 00, 01", "19 and 10 more"):
        data_files(str(tmp_path), ["x"])
    (tmp_path / "empty").mkdir()
    with raises("the directory holds nothing"):
        data_files(str(tmp_path / "empty"), ["x"])


def test_a_wrong_root(tmp_path):
    with raises("data.root=", "gone does not exist: set data.root", "a, b"):
        data_files(str(tmp_path / "gone"), ["a", "b"])
    (tmp_path / "file").touch()
    with raises("file is a file, not a directory"):
        data_files(str(tmp_path / "file"), ["a"])


def test_text_that_no_tokenizer_takes():
    with raises("f, line 3: the article is int, not text"):
        clean_text(3, "f, line 3", "article")
    with raises("f, line 3: the article holds half of a surrogate pair"):
        clean_text("a" + json.loads('"\\ud83c"'), "f, line 3", "article")
    with raises("hub, i1: the article holds a NUL"):
        clean_text("a\0b", "hub, i1", "article")
    assert clean_text(json.loads('" \\ud83c\\udfe0\\n"'), "f", "article") == "🏠"


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "x\u2028y"}\r\n[1]\n'.encode())
    assert read_jsonl(path) == [{"a": "x\u2028y"}, [1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"a": 1}\n{"a": }\n', "line 2: invalid JSON"), ('{"a": 1}\n\n{}\n', "line 2: invalid JSON")],
)
def test_faulty_jsonl(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with raises(tmp_path / "a.jsonl", message):
        read_jsonl(tmp_path / "a.jsonl")


def test_faulty_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1,\n"b": [1,\n}', encoding="utf-8")
    with raises(tmp_path / "a.json", "line 3: invalid JSON"):
        read_json(tmp_path / "a.json")


def test_members_of_json():
    assert members({"a": None, "b": 1}, ["a"], "f") == [None]
    with raises("f, line 1: missing a (present: b, c); add"):
        members({"b": 1, "c": 2}, ["a", "b"], "f, line 1")
    with raises("f, line 1: missing a, d (present: nothing); add"):
        members({}, ["a", "d"], "f, line 1")
    with raises("f, line 1: expected an object with a, found list"):
        members([], ["a"], "f, line 1")
    with raises("f: 'a' is str, not a list"):
        entries({"a": "text"}, "a", "f")


def test_hub_faults_become_one_message(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with raises("cannot load owner/name from the Hugging Face hub (no route)", "set data.root=DIR", "a and b"):
        load_hub_split("owner/name", None, "train", ["a", "b"])


@given(st.integers(0, 200), st.integers(0, 200))
def test_spread_takes_one_of_every_stretch(total: int, count: int) -> None:
    chosen = spread(range(total), count)
    if count >= total:
        assert chosen == list(range(total))
        return
    assert len(chosen) == count
    assert all(i * total // count <= item < (i + 1) * total // count for i, item in enumerate(chosen))
    assert chosen == spread(range(total), count)


def test_spread_does_not_miss_what_comes_at_regular_distances() -> None:
    # Every second or third of 500 examples whose five levels take turns would be of level 1 and 3 alone.
    levels = Counter(position % 5 for position in spread(range(500), 200))
    assert set(levels) == set(range(5)) and min(levels.values()) > 25


def test_a_nul_means_another_encoding(tmp_path):
    (tmp_path / "a.en").write_bytes("eins\nzwei\n".encode("utf-16-le"))
    with raises(tmp_path / "a.en", "line 1: a NUL", "UTF-16", "convert it to UTF-8"):
        read_lines(tmp_path / "a.en")
    (tmp_path / "a.json").write_bytes(b'{"a":\n "x\x00"}')
    with raises(tmp_path / "a.json", "line 2: a NUL"):
        read_json(tmp_path / "a.json")


def test_a_cr_ends_no_line(tmp_path):
    (tmp_path / "b.en").write_bytes(b"one\rmore\ntwo\r\n")
    assert read_lines(tmp_path / "b.en") == ["one\rmore", "two"]


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5_000])
def test_json_beyond_pythons_limits(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(f"1\n{value}\n", encoding="utf-8")
    with raises(tmp_path / "a.jsonl", "line 2: invalid JSON"):
        read_jsonl(tmp_path / "a.jsonl")
