"""Tables 1 to 4 and 9 to 14: quality at matched skip rates; and their overview."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

from firstlab.config.grid import Run, methods_of, run_of
from firstlab.store import paper
from firstlab.store.paper import Printed, QualityTable
from firstlab.tables.cells import OFF_LEVEL, Cells, Score
from firstlab.tables.table import LORA, Cell, Column, Table, columns, interval, number, percent

METRICS = {
    "bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu": "BLEU", "comet": "COMET",
    "bertscore": "BERTScore F1", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "em": "EM", "f1": "F1",
}  # fmt: skip
#: Headline metric of each of the paper's tasks.
HEADLINE = {"wmt_ende": "bleu", "wmt_enzh": "bleu", "cnn_dm": "rougeL", "squad": "f1"}
METHODS = {
    "none": "Base", "skip_decode": "Skip Decode", "random_skip": "Random Skip", "unified_skip": "Unified Skip",
    "first_soft": "FiRST, paper's form", "first": "FiRST (ours)", "sleb": "SLEB", "shortgpt": "ShortGPT",
    "early_exit": "Early exit", "static_first": "FiRST made static", "oracle": "Oracle",
}  # fmt: skip
TASKS = {
    "wmt_ende": "English to German", "wmt_enzh": "English to Chinese", "cnn_dm": "Summarization",
    "squad": "Question answering",
}  # fmt: skip


def method_title(name: str) -> str:
    """How a method is called in tables."""
    return METHODS.get(name, name)


def score_cell(score: Score | None, reason: str, run: Run) -> Cell:
    """A metric of ours with its interval, seeds and mark; or why there is none, and the command that fills it."""
    if score is None:
        return missing_cell(reason, run)
    detail = interval(score.low, score.high)
    text = f"{score.value:.1f}"
    if score.deviation is not None:
        text += f" ± {score.deviation:.1f}"
    if score.seeds > 1:
        detail = f"{detail} {score.seeds} seeds".strip()
    note = f"measured skip rate {100 * score.skip_rate:.1f} %"
    if score.p_value is not None and score.difference is not None:
        note += f"; difference to the reference {score.difference:+.2f}, p = {score.p_value:.3f}"
    if score.tested:
        note += f", over {_seeds(score.tested)}"
    if score.others:
        note += f"; without {_seeds(score.others)}, evaluated on another test set"
    if score.mark.startswith("("):
        note += "; in parentheses: the worse of the two skips more"
    return Cell(text, score.value, detail, score.mark, note, kind="ours")


def _seeds(seeds: tuple[int, ...]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def missing_cell(reason: str, run: Run) -> Cell:
    """No run: the reason and the command. What runs exist but did not measure is no missing run."""
    if reason == "not measured":
        return Cell(note=reason)
    if reason.startswith(OFF_LEVEL):
        return Cell(OFF_LEVEL, note=reason)
    return Cell("no run", note=reason, command=run.command(), kind="missing")


def paper_cell(printed: Printed | None) -> Cell:
    """A number of the paper."""
    if printed is None:
        return Cell()
    if printed.value is None:
        return Cell(note="illegible in our copy of the paper")
    borrowed = "illegible here in our copy of the paper; taken from the table that prints the same cell"
    return Cell(f"{printed.value:.2f}", printed.value, note=borrowed if printed.borrowed else "", kind="paper")


def rate_cell(cells: Cells, run: Run, lora: bool) -> Cell:
    """Measured skip rate in percent."""
    match, reason = cells.find(run, lora)
    return Cell(note=reason) if match is None else percent(match.skip_rate)


def errata(concerns: Callable[[str], bool]) -> list[str]:
    """The paper's errata whose place concerns a table."""
    return [f"{each['where']}: {each['note']}" for each in paper.read()["errata"] if concerns(each["where"])]


def quality_table(cells: Cells, printed: QualityTable) -> Table:
    """Ours beside the paper's, one row per level, method and configuration."""
    scale = cells.scale
    heads = columns("Skip (paper)", "Method", "LoRA")
    shown: list[tuple[str, str, bool]] = []
    for task in printed.tasks:
        ours = f"{TASKS[task]}, {scale.tasks[task]}"
        heads.append(Column("skip", ours))
        for metric in dict.fromkeys((*printed.metrics, HEADLINE[task])):
            measured = _is_measured(cells, scale.tasks[task], metric)
            shown.append((task, metric, measured))
            if measured:
                heads.append(Column(METRICS[metric], ours))
            if metric in printed.metrics:
                heads.append(Column(f"{METRICS[metric]}, paper", ours))
    rows = []
    for level in (0, *printed.levels):
        for method in methods_of(printed.number, scale):
            if (method == "none") == (level == 0):
                rows += [_row(cells, printed, shown, level, method, lora) for lora in (True, False)]
    name = printed.number

    def about(where: str) -> bool:
        words = where.replace(",", " ").split()
        return words[0] in ("Table", "Tables") and bool({name, name.rstrip("ab")} & set(words))

    section = "Quality" if len(name.rstrip("ab")) == 1 and name != "9" else "Quality in detail"
    title = f"Table {name}. {printed.title}"
    return Table(f"table{name}", title, heads, rows, _caption(cells, printed), errata(about), section)


def _row(
    cells: Cells, printed: QualityTable, shown: list[tuple[str, str, bool]], level: int, method: str, lora: bool
) -> list[Cell]:
    scale, theirs = cells.scale, printed.rows.get((level, method, lora), {})
    row = [number(level, "d", "", " %"), Cell(method_title(method)), LORA[lora]]
    for place, (task, metric, measured) in enumerate(shown):
        run = run_of(scale, task, printed.model, method, level)
        reference = None if method == "none" else run_of(scale, task, printed.model, cells.config.reference, level)
        if place == 0 or task != shown[place - 1][0]:
            row.append(rate_cell(cells, run, lora))
        if measured:
            row.append(score_cell(*cells.score(run, lora, metric, reference), run))
        if metric in printed.metrics:
            row.append(paper_cell(theirs.get((task, metric))))
    return row


def overview(cells: Cells) -> Table:
    """Headline metric of every task and level with LoRA, and what it keeps of Base + LoRA."""
    scale = cells.scale
    heads, rows = columns("Method"), []
    for task in scale.tasks:
        group = f"{scale.tasks[task]}: {METRICS[HEADLINE[task]]}"
        heads += columns(*(f"{100 * scale.levels[level]:g} % skip" for level in cells.levels), group=group)
    for method in scale.methods:
        row = [Cell(method_title(method) + " + LoRA")]
        for task, level in product(scale.tasks, cells.levels):
            base, run = cells.run(task, "none", 0), cells.run(task, method, level)
            dense, _ = cells.score(base, True, HEADLINE[task])
            reference = None if method == "none" else cells.run(task, cells.config.reference, level)
            score, reason = cells.score(run, True, HEADLINE[task], reference)
            cell = score_cell(score, reason, run)
            same = method != "none" and cells.on_same_prompts(run, base, True)
            if score and dense and dense.value and same:
                kept = f"{100 * score.value / dense.value:.1f} % kept at {100 * score.skip_rate:.1f} %"
                cell = replace(cell, detail=kept, note=f"{cell.detail}; {cell.note}")
            row.append(cell)
        rows.append(row)
    caption = (
        "Headline metric with LoRA at matched skip rates; behind it the share of Base + LoRA's score that is kept, and "
        "the measured skip rate."
    )
    return Table("overview", "Overview", heads, rows, caption, section="Overview")


def _caption(cells: Cells, printed: QualityTable) -> str:
    scale = cells.scale
    ours = f"{scale.models[printed.model]} on {', '.join(scale.tasks[task] for task in printed.tasks)}"
    stands = "" if scale.models[printed.model] == printed.model else ", which stands in here,"
    levels = ", ".join(f"{level} % → {100 * scale.levels[level]:g} %" for level in printed.levels)
    return (
        f"Ours: {ours}{stands} beside the paper's numbers. Our runs for the paper's levels: {levels}, matched by "
        f"measured skip rate within ±{100 * cells.config.tolerance:g} points."
    )


def _is_measured(cells: Cells, task: str, metric: str) -> bool:
    """False only where runs of the task exist and none has the metric."""
    nodes = [record.node for record in cells.library.records if record.node["data"] == task]
    return not nodes or any(metric in part["metrics"] for node in nodes for part in node["variants"].values())
