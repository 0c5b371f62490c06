"""How results are named for readers."""

from __future__ import annotations

import pytest

from firstlab.results import row_title, rows


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
    [row] = rows({**names, "variants": {"base" if method == "none" else "router": variant}})
    assert row_title(row) == title
