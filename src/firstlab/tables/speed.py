"""Tables 5 to 7 (TPOT), 8 (splits), 15 (layers against α), figures 3 to 6 and the routers' overhead."""

from __future__ import annotations

from typing import Any

from firstlab.config.grid import FIRST, run_of, tpot_of
from firstlab.store import paper
from firstlab.tables import pictures
from firstlab.tables.cells import Cells
from firstlab.tables.quality import TASKS, method_title, missing_cell, paper_cell, rate_cell
from firstlab.tables.records import expected_settings
from firstlab.tables.table import Cell, Column, Table


def tpot_tables(cells: Cells) -> list[Table]:
    """Tables 5 to 7: time per output token of Router + LoRA, routed ÷ dense."""
    return [_tpot_table(cells, number, node) for number, node in tpot_of(cells.config.scale).items()]


def _tpot_table(cells: Cells, number: str, node: dict[str, Any]) -> Table:
    scale = cells.config.scale
    methods = [name for name in FIRST if name in scale.methods]
    columns, rows = [Column("Method"), Column("Level")], []
    for task in node["tasks"]:
        group = f"{TASKS[task]}, {scale.tasks[task]}"
        columns += [Column("Skip (paper)", group), Column("skip", group), Column("TPOT ratio", group)]
        columns.append(Column("TPOT ratio, paper", group))
    depth = max(len(ratios) for ratios in node["tasks"].values())
    for method in methods:
        for step in range(depth):
            row = [Cell(method_title(method) + " + LoRA"), Cell(str(step + 1), step + 1)]
            for task, ratios in node["tasks"].items():
                if step >= len(ratios):
                    row += [Cell() for _ in range(4)]
                    continue
                level = sorted(ratios)[step]
                run = run_of(scale, task, node["model"], method, level)
                match, reason = cells.find(run, True)
                ours = missing_cell(reason, run)
                if match is not None:
                    ratio = match.mean("timing", "tpot_ratio")
                    ours = _ratio_cell(ratio, match.parts) if ratio is not None else Cell(note="not measured")
                theirs = paper_cell(ratios[level], "x") if method == "first_soft" else Cell()
                row += [Cell(f"{level} %", level), rate_cell(cells, run, True), ours, theirs]
            rows.append(row)
    caption = (
        "Routed ÷ dense time per output token of one model, batch size 1, both timed in turn in one process; brackets: "
        "quartiles over prompts. The paper's ratios are relative to its LoRA fine-tuned base model."
    )
    errata = [each for each in paper.read()["errata"] if number.startswith("7") and each["where"].startswith("Table 7")]
    notes = [f"{each['where']}: {each['note']}" for each in errata]
    return Table(f"table{number}", f"Table {number}. {node['title']}", columns, rows, caption, notes, "Speed")


def _ratio_cell(ratio: float, parts: list[dict[str, Any]]) -> Cell:
    quartiles = parts[0]["timing"].get("tpot_ratio_quartiles") if len(parts) == 1 else None
    detail = f"[{quartiles[0]:.2f}, {quartiles[1]:.2f}]" if quartiles else f"{len(parts)} seeds"
    return Cell(f"{ratio:.2f}x", ratio, detail, kind="ours")


def splits_table(cells: Cells) -> Table:
    """Table 8."""
    columns = [Column("Task"), Column("ours stands for")]
    columns += [Column(name, group) for group in ("ours", "paper") for name in ("train", "validation", "test")]
    rows = []
    for task, theirs in paper.read()["splits"].items():
        if task not in cells.config.scale.tasks:
            continue
        name = cells.config.scale.tasks[task]
        run = run_of(cells.config.scale, task, next(iter(cells.config.scale.models)), "none", 0)
        settings = expected_settings(run.overrides)
        sizes = sorted(
            {part["n"] for r in cells.library.records if r.node["data"] == name for part in r.node["variants"].values()}
        )
        test = (
            Cell(", ".join(map(str, sizes)), sizes[-1], note="examples in recorded runs")
            if sizes
            else Cell(note="no run")
        )
        row = [Cell(name), Cell(TASKS[task])]
        for size in (settings["data.train_size"], settings["data.val_size"]):
            row.append(Cell("all others" if size is None else str(size), size))
        rows.append([*row, test, *(Cell(str(theirs[part]), theirs[part], kind="paper") for part in theirs)])
    errata = [each for each in paper.read()["errata"] if each["where"].startswith("Table 8")]
    notes = [f"{each['where']}: {each['note']}" for each in errata]
    caption = "Examples. The test column is what recorded runs were evaluated on."
    return Table("table8", "Table 8. Training, validation and test examples", columns, rows, caption, notes, "Setting")


def per_layer_table(cells: Cells) -> Table:
    """Table 15: share of prompts that skip each layer, against the level."""
    node, scale = paper.read()["per_layer"], cells.config.scale
    columns, data = [Column("Layer")], []
    for column in node["columns"]:
        which = "R + L" if column["variant"] == "router_lora" else "R"
        columns.append(Column(which, f"paper, α = {column['alpha']:g}"))
        data.append([*paper.per_layer_shares(column, node["layers"]), column["average"]])
    theirs = len(data)
    ours = node["model"] in scale.models and node["task"] in scale.tasks
    levels = [level for level in (15, 25, 35) if ours and level in scale.levels]
    for method in (name for name in FIRST if name in scale.methods):
        for level in levels:
            run = run_of(scale, node["task"], node["model"], method, level)
            for lora in (False, True):
                match, _ = cells.find(run, lora)
                if match is not None:
                    shares = [100 * share for share in match.parts[0]["skip"]["per_layer"]]
                    asked = match.records[0].level
                    columns.append(Column("R + L" if lora else "R", f"{method_title(method)}, {asked}"))
                    data.append([*shares, 100 * match.parts[0]["skip"]["skip_rate"]])
    rows = []
    layers = max(len(values) for values in data) - 1
    for layer in range(layers + 1):
        name = Cell(str(layer), layer) if layer < layers else Cell("Avg")
        row = [name]
        for i, values in enumerate(data):
            own = len(values) - 1
            value = values[-1] if layer == layers else values[layer] if layer < own else None
            kind = "paper" if i < theirs else "ours"
            row.append(Cell() if value is None else Cell(f"{value:.2f}", value, kind=kind))
        rows.append(row)
    notes = [f"{each['where']}: {each['note']}" for each in paper.read()["errata"] if each["where"] == "Table 15"]
    caption = (
        "Percent of prompts that skip a layer; R: routers, R + L: after LoRA. Paper: LLaMA-3-8B, 32 layers, en-de."
    )
    if ours:
        caption += f" Ours: {scale.models[node['model']]} on {scale.tasks[node['task']]}; columns appear as runs do."
    title = "Table 15. Skipped layers against α"
    return Table("table15", title, columns, rows, caption, notes, "Routing", pictures.heatmap(columns, data))


def figures(cells: Cells) -> list[Table]:
    """Figures 3 to 6: bars of skipped layers at 15 %; the table beside says the same in words."""
    found: list[Table] = []
    scale, level = cells.config.scale, 15
    if level not in scale.levels:
        return found
    for number, node in paper.read()["figures"].items():
        if node["task"] not in scale.tasks:
            continue
        panels, rows = [], []
        if node["task"] == paper.read()["per_layer"]["task"]:
            column = paper.read()["per_layer"]["columns"][1]
            panels.append(("Paper, LLaMA-3-8B, Table 15", paper.per_layer_shares(column, 32)))
        rows.append([Cell("paper, LLaMA-3-8B (text)"), _layers(node["fully"]), _layers(node["partly"])])
        for method in (name for name in FIRST if name in scale.methods):
            run = run_of(scale, node["task"], next(iter(scale.models)), method, level)
            for lora in (False, True):
                name = f"{method_title(method)}{' + LoRA' if lora else ''}, {scale.tasks[node['task']]}"
                match, reason = cells.find(run, lora)
                if match is None:
                    rows.append([Cell(name), missing_cell(reason, run), Cell()])
                    continue
                shares = [100 * share for share in match.parts[0]["skip"]["per_layer"]]
                panels.append((f"{name}: {100 * match.skip_rate:.1f} % skipped", shares))
                fully = [layer for layer, share in enumerate(shares) if share > 95]
                partly = [layer for layer, share in enumerate(shares) if 0 < share <= 95]
                rows.append([Cell(name), _layers(fully, "ours"), _layers(partly)])
        columns = [Column("Run"), Column("skipped by all prompts (over 95 %)"), Column("by some")]
        picture = pictures.layer_bars(panels) if panels else ""
        title = f"Figure {number}. {node['title']} at 15 %"
        caption = "Bars: percent of prompts that skip the layer. The paper's bars carry no numbers; its text does."
        found.append(Table(f"figure{number}", title, columns, rows, caption, section="Routing", picture=picture))
    return found


def _layers(layers: list[int], kind: str = "") -> Cell:
    return Cell(", ".join(map(str, layers)) or "none", kind=kind)


def overhead_table(cells: Cells) -> Table:
    """The routers' parameters, exactly, and their share of time where it was measured."""
    columns = [Column("Model"), Column("hidden size D"), Column("layers m"), Column("router parameters D·m")]
    columns += [Column("of the model"), Column("of the model, paper"), Column("share of forward time, paper")]
    columns.append(Column("share of prefill time"))
    rows = []
    for name, node in paper.read()["routers"].items():
        count = node["hidden_size"] * node["layers"]
        share = 100 * count / node["total_parameters"]
        rows.append(
            [
                Cell(name),
                Cell(str(node["hidden_size"]), node["hidden_size"]),
                Cell(str(node["layers"]), node["layers"]),
                Cell(f"{count:,}", count, kind="ours"),
                Cell(f"{share:.4f} %", share, kind="ours"),
                Cell(f"{node['stated_share']:.4f} %", node["stated_share"], kind="paper"),
                Cell(f"{node['share_of_time']:g} %", node["share_of_time"], kind="paper"),
                _router_time(cells, name),
            ]
        )
    for name in sorted({each["model"] for each in cells.library.benchmarks} - set(paper.read()["routers"])):
        rows.append([Cell(name), *[Cell() for _ in columns[2:]], _router_time(cells, name)])
    notes = [
        f"{each['where']}: {each['note']}" for each in paper.read()["errata"] if "router parameters" in each["where"]
    ]
    caption = (
        "Parameters follow from the architecture. Time: what python -m firstlab.benchmark recorded (benchmark.json), "
        "mean over its batch sizes and prompt lengths; decode has no router time."
    )
    return Table("overhead", "Router overhead", columns, rows, caption, notes, "Speed")


def _router_time(cells: Cells, model: str) -> Cell:
    measured = [each for each in cells.library.benchmarks if each["model"] == model]
    shares = [100 * cell["router_share_of_prefill"] for each in measured for cell in each["cells"]]
    if not shares:
        return Cell(note="not measured")
    mean = sum(shares) / len(shares)
    devices = ", ".join(dict.fromkeys(each["device"] for each in measured))
    return Cell(f"{mean:.2f} %", mean, f"[{min(shares):.2f}, {max(shares):.2f}]", note=f"range; {devices}", kind="ours")
