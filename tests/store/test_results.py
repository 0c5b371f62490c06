"""Results are read back, and named for readers."""

from __future__ import annotations

import csv
import json
import lzma
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlab.run.report import row_title, rows_of_record
from firstlab.store import machine, results
from firstlab.store.machine import provenance
from firstlab.store.results import RESULT, rate_by_token, read, read_failure, write_failure


@pytest.mark.parametrize(
    ("method", "level", "note", "title"),
    [
        ("first", "target 15 %", None, "FiRST Router (target 15 %)"),
        ("sleb", "target 15 %", "rank2", "sleb Router (target 15 %, rank2)"),
        ("none", "", None, "Base"),
        ("none", "", "rank2", "Base (rank2)"),
    ],
)
def test_rows_that_differ_in_their_note_are_told_apart(method: str, level: str, note: str | None, title: str):
    variant = {"primary_metric": "bleu", "metrics": {}, "skip": {}}
    names = {"method": method, "label": method, "level": level, "note": note, "directory": "d"}
    [row] = rows_of_record({**names, "variants": {"base" if method == "none" else "router": variant}})
    assert row_title(row) == title


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = provenance()
    assert found["revision"] is None and found["uncommitted_changes"] is False


def test_the_revision_of_somebody_elses_repository_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    installed = tmp_path / "venv" / "results.py"
    installed.parent.mkdir()
    installed.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert provenance()["revision"] is None


def finished(seed: int) -> dict:
    variant = {
        "n": 2,
        "skip": {"skip_rate": 0.5, "per_layer": [0.0, 1.0]},
        "metrics": {"f1": {"value": 70.5, "low": 60, "high": 80}},
        "primary_metric": "f1",
        "examples": {"test_set": "abcd", "nll": results.pack([0.1, 2.25]), "scores": {"f1": results.pack([[1], [0]])}},
    }
    sections = ("model", "data", "method", "router", "lora", "router_phase", "lora_phase", "evaluation")
    names = dict.fromkeys(("method", "label", "model", "data", "directory", "config_hash"), "x")
    config: dict = {section: {} for section in sections}
    return {**names, "seed": seed, "num_layers": 2, "config": config, "variants": {"router": variant}}


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(1, 60)), min_size=1, max_size=20))
def test_the_rate_by_token_counts_layers_of_all_decode_steps(prompts: list[tuple[int, int]]):
    rates, tokens = np.array([skipped / 16 for skipped, _ in prompts]), np.array([length for _, length in prompts])
    skipped = [count for count, length in prompts for _ in range(length - 1)]
    expected = sum(skipped) / (16 * len(skipped)) if skipped else rates.mean()
    assert rate_by_token(rates, tokens) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"variants": {', "valid JSON"), ("[]", "is not a mapping"), ('{"n": 1}', "it has no method"), ("\xff", "codec")],
)
def test_a_record_that_cannot_be_read_is_named_with_the_way_out(tmp_path: Path, text: str, reason: str):
    (tmp_path / RESULT).write_text(text, encoding="latin-1")
    with pytest.raises(
        ValueError, match=rf"result.json is no result of .*{reason}.*; pass overwrite=true to run again"
    ):
        read(tmp_path)
    with pytest.raises(ValueError, match=rf"{reason}.*; delete it$"):
        read(tmp_path, "delete it")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"phases": "x"}, "phases='x' is not a mapping"),
        ({"phases": {"router": None, "lora": [None]}}, r"phases.lora=\[None\] is not a mapping"),
        ({"variants": {"router": {**finished(0)["variants"]["router"], "examples": {"a": {}}}}}, "examples.a: .*read"),
        (
            {"variants": {"router": {**finished(0)["variants"]["router"], "examples": {"a": None}}}},
            "examples.a: .*read",
        ),
    ],
)
def test_a_record_with_a_part_of_another_type_is_left_out(tmp_path: Path, change: dict, reason: str):
    assert results.checked({**finished(0), "phases": {"router": None, "lora": {"steps": 1}}}, results.RECORD)
    with pytest.raises(ValueError, match=reason):
        results.checked({**finished(0), **change}, results.RECORD)


def test_records_are_packed_together(tmp_path: Path):
    refused: list[str] = []
    one, two = (finished(seed) for seed in (0, 1))
    file = results.add(tmp_path / "study", {"b": two, "a": one})
    before = file.read_bytes()
    assert file.name == results.PACKED and results.add(tmp_path / "study", {"a": one}).read_bytes() == before
    found = dict(results.read_all(tmp_path, refused.append))
    assert list(found) == [file / "a", file / "b"] and found[file / "a"] == results.plain(one) and not refused
    with (tmp_path / "study" / results.SUMMARY).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["name"], row["variant"], row["seed"], row["value"]) for row in rows] == [
        ("a", "router", "0", "70.5"), ("b", "router", "1", "70.5"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"records\.jsonl\.xz: a records another configuration; choose another folder"):
        results.add(tmp_path / "study", {"a": {**one, "config_hash": "another"}})
    for damage in (before[:-30], b"torn", lzma.compress(b"{\n"), lzma.compress(b'{"name": 1}\n')):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"records.jsonl.xz.* is left out: .*; repair or delete the file"):
            results.add(tmp_path / "study", {"c": one})
        assert file.read_bytes() == damage


def test_what_can_be_read_of_a_torn_file_is_read(tmp_path: Path):
    warnings: list[str] = []
    lines = [json.dumps({"name": name, **finished(0)}) for name in "ab"]
    (tmp_path / results.PACKED).write_bytes(lzma.compress(f"{lines[0]}\n{lines[1][:99]}\n{lines[1]}\n".encode()))
    assert [file.name for file, _ in results.read_all(tmp_path, warnings.append)] == ["a", "b"]
    assert len(warnings) == 1 and "records.jsonl.xz/line 2 is left out: not valid JSON" in warnings[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"error": null}'])
def test_a_torn_failure_is_a_failure(tmp_path: Path, text: str):
    assert read_failure(tmp_path) is None
    write_failure(tmp_path, ValueError("out of luck"))
    assert (read_failure(tmp_path) or {})["error"] == "out of luck"
    (tmp_path / "failure.json").write_text(text)
    assert read_failure(tmp_path) == {"error": f"{tmp_path / 'failure.json'} cannot be read"}


@pytest.mark.parametrize("values", [[0, 1, 255], [[1.5, 2.25], [0.1, -3]], np.zeros((3, 0)), [True, False]])
def test_numbers_come_back_from_either_form(values):
    packed = results.pack(values)
    [listed] = results.plain({"variants": {"a": {"examples": {"nll": packed}}}})["variants"]["a"]["examples"].values()
    assert np.array_equal(results.unpack(packed), results.unpack(json.loads(json.dumps(listed))))
    assert np.allclose(results.unpack(packed), np.asarray(values, dtype=float), rtol=1e-7)


@pytest.mark.parametrize("text", ["", "äöü", "AAAA"])
def test_unpacking_something_else_is_an_error(text: str):
    with pytest.raises(ValueError, match="cannot be read"):
        results.unpack(text)
