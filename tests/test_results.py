"""How results are named for readers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firstlab.results import rate_by_token, row_title, rows


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


@given(st.lists(st.tuples(st.integers(0, 16), st.integers(1, 60)), min_size=1, max_size=20))
def test_the_rate_by_token_counts_layers_of_all_decode_steps(prompts: list[tuple[int, int]]):
    rates, tokens = np.array([skipped / 16 for skipped, _ in prompts]), np.array([length for _, length in prompts])
    skipped = [count for count, length in prompts for _ in range(length - 1)]
    expected = sum(skipped) / (16 * len(skipped)) if skipped else rates.mean()
    assert rate_by_token(rates, tokens) == pytest.approx(expected)
