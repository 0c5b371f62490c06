"""JSON without numbers that JSON does not know, and directories that cannot be had."""

import json
import math
from pathlib import Path

import pytest

from firstlab import results
from firstlab.files import claimed, json_text


def test_what_is_not_finite_is_null():
    value = {"a": [1.5, math.inf, (-math.inf, "x")], "b": {"c": math.nan, "d": None, "e": True}}
    assert json.loads(json_text(value)) == {"a": [1.5, None, [None, "x"]], "b": {"c": None, "d": None, "e": True}}
    assert json_text({"ü": 1}) == '{"ü": 1}'


def test_a_record_is_strict_json(tmp_path: Path):
    def refuse(constant: str):
        raise AssertionError(constant)

    results.write(tmp_path, {"perplexity": math.inf, "loss": math.nan})
    text = (tmp_path / results.RESULT).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {"perplexity": None, "loss": None}
    assert [file.name for file in tmp_path.iterdir()] == [results.RESULT]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    wanted = tmp_path / "file" / "runs" / "first"
    with (
        pytest.raises(ValueError, match=rf"{wanted} cannot be written \(Not a directory\); choose another"),
        claimed(wanted),
    ):
        pass
