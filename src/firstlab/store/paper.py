"""The paper's numbers, as printed, read from `paper.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

#: (level in percent, method, with LoRA)
RowKey = tuple[int, str, bool]


@dataclass(frozen=True)
class Printed:
    """One number of the paper."""

    value: float | None  # None where our copy of the paper has lost it
    borrowed: bool = False  # from the sister table that prints the same cell


@dataclass(frozen=True)
class QualityTable:
    """One of tables 1 to 4 and 9 to 14; a and b are the two halves of one printed table."""

    number: str
    title: str
    model: str
    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    rows: dict[RowKey, dict[tuple[str, str], Printed]]  # (task, metric) of a row to number, in the paper's order

    @property
    def levels(self) -> list[int]:
        """Skip levels in percent, without 0."""
        return sorted({level for level, _, _ in self.rows if level})


@cache
def read() -> dict[str, Any]:
    """All of paper.yaml but the quality tables, which `quality_tables` gives."""
    node: dict[str, Any] = yaml.safe_load(files("firstlab.store").joinpath("paper.yaml").read_text(encoding="utf-8"))
    return node


@cache
def quality_tables() -> dict[str, QualityTable]:
    """The quality tables by their numbers in the paper."""
    return {number: _quality(number, node) for number, node in read()["quality"].items()}


def _quality(number: str, node: dict[str, Any]) -> QualityTable:
    columns = [(task, metric) for task in node["tasks"] for metric in node["metrics"]]
    rows: dict[RowKey, dict[tuple[str, str], Printed]] = {}
    for line in node["rows"].strip().splitlines():
        level, method, configuration, *values = line.split()
        key = (int(level), method, {"lora": True, "plain": False}[configuration])
        if key in rows:
            raise ValueError(f"paper.yaml: table {number} has the row {line!r} twice")
        numbers = [Printed(None) if x == "-" else Printed(float(x.rstrip("?")), x.endswith("?")) for x in values]
        rows[key] = dict(zip(columns, numbers, strict=True))
    return QualityTable(number, node["title"], node["model"], tuple(node["tasks"]), tuple(node["metrics"]), rows)


def per_layer_shares(column: dict[str, Any], layers: int) -> list[float]:
    """[layers] shares in percent of one column of Table 15."""
    return [float(column["skipped"].get(layer, 0.0)) for layer in range(layers)]
