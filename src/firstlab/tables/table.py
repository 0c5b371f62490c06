"""A table, written as Markdown, CSV or LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

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
    """One cell: its text (a dash where it is empty), and the number that is sorted by and stands in the CSV."""

    text: str = ""
    value: float | None = None
    detail: str = ""  # interval, seeds: smaller, behind the text
    mark: str = ""  # of a test
    note: str = ""  # why there is no value, or what else should be known
    command: str = ""  # what fills an empty cell
    kind: str = ""  # ours, paper, rate, missing: for looks

    @property
    def hint(self) -> str:
        return " — ".join(part for part in (self.note, self.command) if part)

    @property
    def plain(self) -> str:
        return " ".join(part for part in (self.text or "–", self.mark, self.detail) if part)


#: Without LoRA, with it.
LORA = {False: Cell("–"), True: Cell("+ LoRA")}


def number(value: float | None, form: str = ".1f", kind: str = "ours", unit: str = "") -> Cell:
    """A number, or that it was not measured."""
    return Cell(note="not measured") if value is None else Cell(f"{value:{form}}{unit}", value, kind=kind)


def percent(rate: float | None, form: str = ".1f") -> Cell:
    """A skip rate in percent, or that it was not measured."""
    return number(None if rate is None else 100 * rate, form, "rate", " %")


def interval(low: float | None, high: float | None, form: str = ".1f") -> str:
    """As it stands behind a value; nothing without one."""
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


@dataclass(frozen=True)
class Column:
    """A column; columns of one group that stand side by side share a heading."""

    name: str
    group: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.group} {self.name}".strip()


def columns(*names: str, group: str = "") -> list[Column]:
    """Columns of one group."""
    return [Column(name, group) for name in names]


@dataclass
class Table:
    """A table, and the picture above it."""

    key: str  # its files' name and its anchor on the page
    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    caption: str = ""
    notes: list[str] = field(default_factory=list)
    section: str = ""
    picture: str = ""  # SVG

    @property
    def missing(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row if cell.kind == "missing"]

    @property
    def filled(self) -> int:
        """Cells with a number of ours."""
        return sum(cell.kind == "ours" for row in self.rows for cell in row)

    @property
    def commands(self) -> list[str]:
        return list(dict.fromkeys(cell.command for cell in self.missing if cell.command))

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Headings of neighbouring columns and how many each spans."""
        return [(group, len(list(each))) for group, each in groupby(column.group for column in self.columns)]

    def classes(self, index: int, cell: Cell | None = None) -> dict[str, str | None]:
        """CSS classes of a cell or heading; columns before the first group of a grouped table lead."""
        groups, cells = [column.group for column in self.columns], [row[index] for row in self.rows]
        names = {
            "lead": any(groups) and not any(groups[: index + 1]),
            "none": cell is not None and not cell.text,
            "text": all(each.value is None and each.kind != "missing" and each.text for each in cells),
            "start": index > 0 and groups[index] != groups[index - 1],
        }
        chosen = [name for name, holds in names.items() if holds] + [cell.kind if cell else ""]
        return {"class": " ".join(chosen).strip() or None}


def markdown(table: Table) -> str:
    """Heading, caption, table, notes, and the commands that fill what is empty."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_one_line(cell).replace("|", "\\|") for cell in cells) + " |"

    lines = [f"## {table.title}", ""]
    if table.caption:
        lines += [table.caption, ""]
    lines += [line([column.full_name for column in table.columns]), "|" + "---|" * len(table.columns)]
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
    suffixes = ("", ": detail", ": test", ": note", ": command")
    lines = [[[column.full_name + suffix for suffix in suffixes] for column in table.columns]]
    for row in table.rows:
        values = [cell.text if cell.value is None else f"{cell.value:.10g}" for cell in row]
        behind = [[cell.detail, cell.mark, cell.note, cell.command] for cell in row]
        lines.append([[value, *rest] for value, rest in zip(values, behind, strict=True)])
    out = io.StringIO()
    shown = [[text for i, each in enumerate(line) for text in (each if i in wide else each[:1])] for line in lines]
    csv.writer(out, lineterminator="\n").writerows(shown)
    return out.getvalue()


def latex(table: Table) -> str:
    """A booktabs table; needs \\usepackage{booktabs,amssymb}."""
    spec = "".join("l" if all(row[i].value is None for row in table.rows) else "r" for i in range(len(table.columns)))
    lines = [r"\begin{table}", r"\centering\small", rf"\caption{{{escape(table.title)}. {escape(table.caption)}}}"]
    lines += [rf"\label{{tab:{table.key}}}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule"]
    if any(group for group, _ in table.groups):
        heads = [rf"\multicolumn{{{span}}}{{c}}{{{escape(group)}}}" for group, span in table.groups]
        lines.append(" & ".join(heads) + r" \\")
    lines += [" & ".join(escape(column.name) for column in table.columns) + r" \\", r"\midrule"]
    lines += [" & ".join(escape(cell.plain) for cell in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def escape(text: str) -> str:
    """For LaTeX; letters of other scripts stay, for XeLaTeX or LuaLaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
