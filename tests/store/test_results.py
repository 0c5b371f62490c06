"""Results are read back, and named for readers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlab.run.report import row_title, rows_of_record
from firstlab.store import results
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
    monkeypatch.setattr(results, "__file__", str(installed))
    assert provenance()["revision"] is None


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(1, 60)), min_size=1, max_size=20))
def test_the_rate_by_token_counts_layers_of_all_decode_steps(prompts: list[tuple[int, int]]):
    rates, tokens = np.array([skipped / 16 for skipped, _ in prompts]), np.array([length for _, length in prompts])
    skipped = [count for count, length in prompts for _ in range(length - 1)]
    expected = sum(skipped) / (16 * len(skipped)) if skipped else rates.mean()
    assert rate_by_token(rates, tokens) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "reason"), [('{"variants": {', "valid JSON"), ("[]", "it has no variants"),
                                              ('{"variants": null}', "it has no variants")])  # fmt: skip
def test_a_record_that_cannot_be_read_is_named_with_the_way_out(tmp_path: Path, text: str, reason: str):
    (tmp_path / RESULT).write_text(text)
    with pytest.raises(ValueError, match=rf"result.json is not .*{reason}.*; pass overwrite=true to run again"):
        read(tmp_path)
    with pytest.raises(ValueError, match=rf"{reason}.*; delete it$"):
        read(tmp_path, "delete it")


@pytest.mark.parametrize("text", ["{", "[]", '{"error": null}'])
def test_a_torn_failure_is_a_failure(tmp_path: Path, text: str):
    assert read_failure(tmp_path) is None
    write_failure(tmp_path, ValueError("out of luck"))
    assert (read_failure(tmp_path) or {})["error"] == "out of luck"
    (tmp_path / "failure.json").write_text(text)
    assert read_failure(tmp_path) == {"error": f"{tmp_path / 'failure.json'} cannot be read"}
