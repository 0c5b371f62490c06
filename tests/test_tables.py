"""Tables say what the result files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firstlab.tables import markdown, read_records


def record(method: str, variant: str, bleu: float, skip: float) -> dict:
    return {
        "method": method, "label": method, "level": "target 15 %", "model": "m", "data": "d", "directory": "x",
        "variants": {variant: {
            "primary_metric": "bleu", "metrics": {"bleu": {"value": bleu, "low": bleu - 1, "high": bleu + 1}},
            "skip": {"skip_rate": skip}, "timing": {"tpot_ratio": 0.9},
        }},
    }  # fmt: skip


def test_rows_carry_values_intervals_and_rates_with_the_dense_model_first(tmp_path: Path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(json.dumps(record("first", "router", 30.04, 0.151)))
    (tmp_path / "results" / "b.json").write_text(json.dumps(record("none", "base", 40, 0)))
    lines = markdown(read_records([tmp_path])).splitlines()
    assert lines[0] == "### d, m"
    assert lines[4] == "| Base | 40.0 [39.0, 41.0] | 0.0 % | 0.90 |"
    assert lines[5] == "| FiRST Router (target 15 %) | 30.0 [29.0, 31.0] | 15.1 % | 0.90 |"


def test_missing_and_foreign_files_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_records([tmp_path / "absent"])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json is not a result file"):
        read_records([tmp_path])
