"""A table and its plain forms: Markdown, CSV, LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$",
    "±": r"$\pm$", "–": "--", "×": r"$\times$", "α": r"$\alpha$", "β": r"$\beta$", "λ": r"$\lambda$", "ρ": r"$\rho$",
    "·": r"$\cdot$", "÷": r"$\div$", "≈": r"$\approx$", "→": r"$\to$", "≤": r"$\leq$", "≥": r"$\geq$", "−": r"$-$",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''", "—": "---", "…": r"\dots{}",
    "‘": "`", "’": "'", "“": "``", "”": "''", "\u00a0": "~",
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: What is shown; empty shows as a dash.
        value: What is sorted by and stands in the CSV; the text where there is no number.
        detail: Smaller, behind the text: interval, seeds.
        mark: Of a test.
        note: Why there is no value, or what else should be known.
        command: What fills an empty cell.
        kind: "ours", "paper", "missing" or "" for looks.
    """

    text: str = ""
    value: float | None = None
    detail: str = ""
    mark: str = ""
    note: str = ""
    command: str = ""
    kind: str = ""

    @property
    def hint(self) -> str:
        """What a pointer held on the cell shows."""
        return " — ".join(part for part in (self.note, self.command) if part)

    @property
    def plain(self) -> str:
        """Everything on one line."""
        return " ".join(part for part in (self.text or "–", self.mark, self.detail) if part)


@dataclass(frozen=True)
class Column:
    """A column; columns of one group that stand side by side share a heading."""

    name: str
    group: str = ""


@dataclass
class Table:
    """A table.

    Attributes:
        key: File name without ending, and anchor on the page.
        title: Heading.
        columns: One per cell of a row.
        rows: Cells.
        caption: What a reader must know.
        notes: Errata and remarks.
        section: Part of the page.
        picture: SVG above the table, or "".
    """

    key: str
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    caption: str = ""
    notes: list[str] = field(default_factory=list)
    section: str = ""
    picture: str = ""

    @property
    def missing(self) -> list[Cell]:
        """Cells with no run."""
        return [cell for row in self.rows for cell in row if cell.kind == "missing"]

    @property
    def filled(self) -> int:
        """Cells with a number of ours."""
        return sum(cell.kind == "ours" for row in self.rows for cell in row)

    @property
    def commands(self) -> list[str]:
        """What fills the empty cells, each command once."""
        return list(dict.fromkeys(cell.command for cell in self.missing if cell.command))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings of neighbouring columns and how many each spans."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans

    def text_column(self, index: int) -> bool:
        """Whether a column holds words only."""
        return all(row[index].value is None and row[index].kind != "missing" and row[index].text for row in self.rows)

    def classes(self, index: int, cell: Cell | None = None) -> dict[str, str | None]:
        """CSS classes of a cell, or of a column's heading.

        A column leads that stands before the first group of a grouped table: it names the rows.
        """
        groups = [column.group for column in self.columns]
        names = {
            "lead": any(groups) and not any(groups[: index + 1]),
            "none": cell is not None and not cell.text,
            "text": self.text_column(index),
            "start": index > 0 and groups[index] != groups[index - 1],
        }
        chosen = [name for name, holds in names.items() if holds] + ([cell.kind] if cell and cell.kind else [])
        return {"class": " ".join(chosen) or None}


def full_name(column: Column) -> str:
    """The column's name with its group."""
    return f"{column.group} {column.name}".strip()


def text_cell(text: str) -> Cell:
    """A cell that only says something."""
    return Cell(text)


def markdown(table: Table) -> str:
    """Heading, caption, table, notes, and the commands that fill what is empty."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"

    lines = [f"## {table.title}", ""]
    if table.caption:
        lines += [table.caption, ""]
    lines += [line([full_name(column) for column in table.columns]), "|" + "---|" * len(table.columns)]
    lines += [line([cell.plain for cell in row]) for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    if table.commands:
        lines += ["", f"{len(table.missing)} cells have no run yet. They are filled by", "", "```bash"]
        lines += [*table.commands, "```"]
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """One line per row; beside each column of ours: what stands behind the number, and what fills an empty cell."""
    wide = {i for row in table.rows for i, cell in enumerate(row) if cell.kind in ("ours", "missing") or cell.detail}
    header: list[str] = []
    for i, column in enumerate(table.columns):
        header.append(full_name(column))
        if i in wide:
            header += [f"{full_name(column)}: {extra}" for extra in ("detail", "test", "note", "command")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        line: list[Any] = []
        for i, cell in enumerate(row):
            line.append(cell.text if cell.value is None else f"{cell.value:.10g}")
            if i in wide:
                line += [cell.detail, cell.mark, cell.note, cell.command]
        writer.writerow(line)
    return out.getvalue()


def latex(table: Table) -> str:
    """A booktabs table; needs \\usepackage{booktabs,amssymb}."""
    spec = "".join("l" if all(row[i].value is None for row in table.rows) else "r" for i in range(len(table.columns)))
    lines = [r"\begin{table}", r"\centering\small", rf"\caption{{{escape(table.title)}. {escape(table.caption)}}}"]
    lines += [rf"\label{{tab:{table.key}}}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule"]
    if any(group for group, _ in table.groups):
        heads = [rf"\multicolumn{{{span}}}{{c}}{{{escape(group)}}}" for group, span in table.groups]
        lines.append(" & ".join(heads) + r" \\")
    lines.append(" & ".join(escape(column.name) for column in table.columns) + r" \\")
    lines.append(r"\midrule")
    lines += [" & ".join(escape(cell.plain) for cell in row) + r" \\" for row in table.rows]
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """For LaTeX; letters of other scripts stay, for XeLaTeX or LuaLaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
