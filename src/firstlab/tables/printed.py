"""The paper's tables and figures, ours beside the paper's numbers; an overview, and the routers' overhead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from firstlab.config.grid import FIRST, Run, methods_of, run_of
from firstlab.store import paper
from firstlab.store.paper import Printed, QualityTable
from firstlab.tables import pictures
from firstlab.tables.cells import OFF_LEVEL, Cells, Match, Score
from firstlab.tables.records import expected_settings
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
    nodes = [record.node for record in cells.library.records if record.node["data"] == task]
    return not nodes or any(metric in part["metrics"] for node in nodes for part in node["variants"].values())


def tpot_table(cells: Cells, name: str, node: dict[str, Any]) -> Table:
    """Tables 5 to 7: time per output token of Router + LoRA, routed ÷ dense."""
    scale = cells.scale
    heads, rows = columns("Method", "Level"), []
    for task in node["tasks"]:
        names = ("Skip (paper)", "skip", "TPOT ratio", "TPOT ratio, paper")
        heads += columns(*names, group=f"{TASKS[task]}, {scale.tasks[task]}")
    for method, step in product(_first(cells), range(max(map(len, node["tasks"].values())))):
        row = [Cell(method_title(method) + " + LoRA"), Cell(str(step + 1), step + 1)]
        for task, ratios in node["tasks"].items():
            if step >= len(ratios):
                row += [Cell() for _ in range(4)]
                continue
            level = sorted(ratios)[step]
            run = run_of(scale, task, node["model"], method, level)
            match, reason = cells.find(run, True)
            ours = missing_cell(reason, run) if match is None else _ratio_cell(match)
            theirs = number(ratios[level], ".2f", "paper", "x") if method == "first_soft" else Cell()
            row += [number(level, "d", "", " %"), rate_cell(cells, run, True), ours, theirs]
        rows.append(row)
    caption = (
        "Routed ÷ dense time per output token of one model, batch size 1, both timed in turn in one process; brackets: "
        "quartiles over prompts. The paper's ratios are relative to its LoRA fine-tuned base model."
    )
    notes = errata(lambda where: name.startswith("7") and where.startswith("Table 7"))
    return Table(f"table{name}", f"Table {name}. {node['title']}", heads, rows, caption, notes, "Speed")


def _first(cells: Cells) -> list[str]:
    return [name for name in FIRST if name in cells.scale.methods]


def _ratio_cell(match: Match) -> Cell:
    ratio, parts = match.mean("tpot_ratio", "timing"), match.parts
    if ratio is None:
        return Cell(note="not measured")
    quartiles = parts[0]["timing"].get("tpot_ratio_quartiles") if len(parts) == 1 else None
    detail = interval(quartiles[0], quartiles[1], ".2f") if quartiles else f"{len(parts)} seeds"
    return Cell(f"{ratio:.2f}x", ratio, detail, kind="ours")


def splits_table(cells: Cells) -> Table:
    """Table 8."""
    heads, rows, scale = columns("Task", "ours stands for"), [], cells.scale
    for group in ("ours", "paper"):
        heads += columns("train", "validation", "test", group=group)
    for task, theirs in paper.read()["splits"].items():
        if task not in scale.tasks:
            continue
        name = scale.tasks[task]
        settings = expected_settings(cells.run(task, "none", 0).overrides)
        records = [each.node for each in cells.library.records if each.node["data"] == name]
        sizes = sorted({part["n"] for node in records for part in node["variants"].values()})
        row = [Cell(name), Cell(TASKS[task])]
        for size in (settings["data.train_size"], settings["data.val_size"]):
            row.append(Cell("all others" if size is None else str(size), size))
        row.append(Cell(", ".join(map(str, sizes)), sizes[-1]) if sizes else Cell(note="no run"))
        rows.append([*row, *(number(count, "d", "paper") for count in theirs.values())])
    notes = errata(lambda where: where.startswith("Table 8"))
    caption = "Examples. The test column is what recorded runs were evaluated on."
    return Table("table8", "Table 8. Training, validation and test examples", heads, rows, caption, notes, "Setting")


def per_layer_table(cells: Cells) -> Table:
    """Table 15: share of prompts that skip each layer, against the level."""
    node, scale = paper.read()["per_layer"], cells.scale
    heads, data = columns("Layer"), []
    for column in node["columns"]:
        which = "R + L" if column["variant"] == "router_lora" else "R"
        heads.append(Column(which, f"paper, α = {column['alpha']:g}"))
        data.append([*paper.per_layer_shares(column, node["layers"]), column["average"]])
    kinds = ["paper"] * len(data)
    ours = node["model"] in scale.models and node["task"] in scale.tasks
    levels = [each for each in (15, 25, 35) if ours and each in scale.levels]
    for method, level, lora in product(_first(cells), levels, (False, True)):
        match, _ = cells.find(run_of(scale, node["task"], node["model"], method, level), lora)
        if match is not None:
            skip, asked = match.parts[0]["skip"], match.records[0].level
            heads.append(Column("R + L" if lora else "R", f"{method_title(method)}, {asked}"))
            data.append([100 * share for share in (*skip["per_layer"], skip["skip_rate"])])
            kinds.append("ours")
    rows = []
    for layer in [*range(max(map(len, data)) - 1), -1]:
        row = [Cell("Avg") if layer < 0 else Cell(str(layer), layer)]
        for values, kind in zip(data, kinds, strict=True):
            row.append(number(values[layer], ".2f", kind) if layer < len(values) - 1 else Cell())
        rows.append(row)
    caption = (
        "Percent of prompts that skip a layer; R: routers, R + L: after LoRA. Paper: LLaMA-3-8B, 32 layers, en-de."
    )
    if ours:
        caption += f" Ours: {scale.models[node['model']]} on {scale.tasks[node['task']]}; columns appear as runs do."
    title, notes = "Table 15. Skipped layers against α", errata(lambda where: where == "Table 15")
    return Table("table15", title, heads, rows, caption, notes, "Routing", pictures.heatmap(heads, data))


def figures(cells: Cells) -> list[Table]:
    """Figures 3 to 6: bars of skipped layers at 15 %; the table beside says the same in words."""
    found: list[Table] = []
    scale, level = cells.scale, 15
    for figure, node in paper.read()["figures"].items():
        if level not in scale.levels or node["task"] not in scale.tasks:
            continue
        panels = []
        if node["task"] == paper.read()["per_layer"]["task"]:
            column = paper.read()["per_layer"]["columns"][1]
            panels.append(("Paper, LLaMA-3-8B, Table 15", paper.per_layer_shares(column, 32)))
        rows = [[Cell("paper, LLaMA-3-8B (text)"), _layers(node["fully"]), _layers(node["partly"])]]
        for method, lora in product(_first(cells), (False, True)):
            name = f"{method_title(method)}{' + LoRA' if lora else ''}, {scale.tasks[node['task']]}"
            run = cells.run(node["task"], method, level)
            match, reason = cells.find(run, lora)
            if match is None:
                rows.append([Cell(name), missing_cell(reason, run), Cell()])
                continue
            shares = [100 * share for share in match.parts[0]["skip"]["per_layer"]]
            panels.append((f"{name}: {100 * match.skip_rate:.1f} % skipped", shares))
            fully = [layer for layer, share in enumerate(shares) if share > 95]
            partly = [layer for layer, share in enumerate(shares) if 0 < share <= 95]
            rows.append([Cell(name), _layers(fully, "ours"), _layers(partly)])
        heads = columns("Run", "skipped by all prompts (over 95 %)", "by some")
        picture = pictures.layer_bars(panels) if panels else ""
        title = f"Figure {figure}. {node['title']} at 15 %"
        caption = "Bars: percent of prompts that skip the layer. The paper's bars carry no numbers; its text does."
        found.append(Table(f"figure{figure}", title, heads, rows, caption, section="Routing", picture=picture))
    return found


def _layers(layers: list[int], kind: str = "") -> Cell:
    return Cell(", ".join(map(str, layers)) or "none", kind=kind)


def overhead_table(cells: Cells) -> Table:
    """The routers' parameters, exactly, and their share of time where it was measured."""
    heads = columns("Model", "hidden size D", "layers m", "router parameters D·m", "of the model")
    heads += columns("of the model, paper", "share of forward time, paper", "share of prefill time")
    rows = []
    for name, node in paper.read()["routers"].items():
        size, layers, stated, time = (node[key] for key in ("hidden_size", "layers", "stated_share", "share_of_time"))
        share = 100 * size * layers / node["total_parameters"]
        row = [Cell(name), number(size, "d", ""), number(layers, "d", ""), number(size * layers, ",d")]
        row += [number(share, ".4f", unit=" %"), number(stated, ".4f", "paper", " %"), number(time, "g", "paper", " %")]
        rows.append([*row, _router_time(cells, name)])
    for name in sorted({each["model"] for each in cells.library.benchmarks} - set(paper.read()["routers"])):
        rows.append([Cell(name), *[Cell() for _ in heads[2:]], _router_time(cells, name)])
    caption = (
        "Parameters follow from the architecture. Time: what python -m firstlab.benchmark recorded (benchmark.json), "
        "mean over its batch sizes and prompt lengths; decode has no router time."
    )
    notes = errata(lambda where: "router parameters" in where)
    return Table("overhead", "Router overhead", heads, rows, caption, notes, "Speed")


def _router_time(cells: Cells, model: str) -> Cell:
    measured = [each for each in cells.library.benchmarks if each["model"] == model]
    shares = [100 * cell["router_share_of_prefill"] for each in measured for cell in each["cells"]]
    if not shares:
        return Cell(note="not measured")
    mean = sum(shares) / len(shares)
    devices = ", ".join(dict.fromkeys(each["device"] for each in measured))
    return Cell(f"{mean:.2f} %", mean, interval(min(shares), max(shares), ".2f"), note=f"range; {devices}", kind="ours")
