"""Tables beyond the paper's: ablations, adaptivity, difficulty and length, every recorded run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from firstlab.config.grid import Run, ablation_runs, at_rate, planned_runs, run_of
from firstlab.store.results import ROW_NAMES
from firstlab.tables import pictures
from firstlab.tables.cells import BETTER, WORSE, Cells, Match, Score, column
from firstlab.tables.quality import HEADLINE, METRICS, method_title, missing_cell, rate_cell, score_cell
from firstlab.tables.table import Cell, Column, Table

#: Methods that skip one set of layers whatever the prompt.
STATIC = ("random_skip", "unified_skip", "sleb")
#: Groups of equally many prompts in the table of lengths.
_LENGTH_GROUPS = 4


def pareto(cells: Cells) -> Table:
    """Quality against measured skip rate: one picture per task, with LoRA and without, and its numbers."""
    scale = cells.config.scale
    model, planned = next(iter(scale.models)), _planned(cells)
    panels, rows = [], []
    for task, ours in scale.tasks.items():
        for lora in (False, True):
            curves: list[pictures.Curve] = []
            base, _ = cells.score(run_of(scale, task, model, "none", 0), lora, HEADLINE[task])
            for method in scale.methods:
                points = [] if base is None or method == "none" else [_point(base)]
                scores = dict.fromkeys(  # a run that stands for two levels is one point
                    cells.score(run_of(scale, task, model, method, level), lora, HEADLINE[task])[0]
                    for level in ([0] if method == "none" else planned[task, method])
                )
                for score in scores:
                    if score is not None:
                        points.append(_point(score))
                        rows.append(_pareto_row(ours, method, lora, score))
                if len(points) > 1 or (method == "none" and points):
                    curves.append((method, method_title(method), sorted(points)))
            if curves:
                title = f"{ours}, {'with' if lora else 'without'} LoRA"
                panels.append((title, METRICS[HEADLINE[task]], curves))
    columns = [Column(name) for name in ("Task", "Method", "LoRA", "skip", "headline metric")]
    caption = "Bars are bootstrap intervals. Lines start at the dense model. Skip rates are measured."
    picture = pictures.quality_against_skip(panels) if panels else ""
    return Table("pareto", "Quality against skip rate", columns, rows, caption, section="Overview", picture=picture)


def _point(score: Score) -> tuple[float, float, float | None, float | None]:
    return 100 * score.skip_rate, score.value, score.low, score.high


def _pareto_row(task: str, method: str, lora: bool, score: Score) -> list[Cell]:
    detail = "" if score.low is None else f"[{score.low:.1f}, {score.high:.1f}]"
    rate = Cell(f"{100 * score.skip_rate:.1f} %", 100 * score.skip_rate)
    value = Cell(f"{score.value:.1f}", score.value, detail, kind="ours")
    return [Cell(task), Cell(method_title(method)), Cell("+ LoRA" if lora else "–"), rate, value]


def equal_rates(cells: Cells) -> Table:
    """The reference beside each static set at exactly the rate that it skips, over prompts and over tokens."""
    scale, reference = cells.config.scale, cells.config.reference
    model, planned = next(iter(scale.models)), _planned(cells)
    columns = [Column(name) for name in ("Task", "Level", "LoRA", "Other method")]
    columns += [Column("value", method_title(reference))]
    for group in ("rate over prompts", "rate over tokens"):
        columns += [Column(name, group) for name in ("both skip", "other method", "difference", "p")]
    columns += [Column("sets of the other method")]
    rows = []
    for task, ours in scale.tasks.items():
        for level in planned[task, reference]:
            run = run_of(scale, task, model, reference, level)
            for lora in (False, True):
                for method in (each for each in STATIC if each in scale.methods):
                    other = run_of(scale, task, model, method, level)
                    rate = Cell(f"{100 * scale.levels[level]:g} %", 100 * scale.levels[level])
                    row = [Cell(ours), rate, Cell("+ LoRA" if lora else "–"), Cell(method_title(method))]
                    rows.append([*row, *_compared(cells, task, model, run, other, lora)])
    caption = (
        "A static set skips whole layers for every prompt, so it meets a rate in between by taking one layer more for "
        f"a share of the prompts: that is what {method_title(reference)} is compared with here, by its measured rate. "
        "Over tokens, prompts with long responses weigh more: decode time follows that rate, and the comparison is "
        f"stricter where {method_title(reference)} skips less for them. "
        "Differences are paired over test prompts; marks are theirs."
    )
    return Table("equal_rates", "At equal skip rates", columns, rows, caption, section="Overview")


def _compared(cells: Cells, task: str, model: str, run: Run, other: Run, lora: bool) -> list[Cell]:
    """The reference's value, the comparison at either of its rates, and the sets that the other method needed."""
    value, groups, made_of = Cell(), [], dict[str, None]()
    for by_token in (False, True):
        found, sets = cells.at_rate_of(run, other, lora, HEADLINE[task], by_token)
        if found is None:
            groups += _absent(cells, task, model, run, other, lora, sets, by_token)
            continue
        seeds = "" if found.seeds == 1 else f"{found.seeds} seeds"
        value = Cell(f"{found.value:.1f}", found.value, seeds, kind="ours")
        test = found.test
        certain = test.p_value < cells.config.significance
        mark = "" if not certain else BETTER if test.difference > 0 else WORSE
        groups += [
            Cell(f"{100 * found.skip_rate:.1f} %", 100 * found.skip_rate, kind="rate"),
            Cell(f"{found.other:.1f}", found.other, kind="ours"),
            Cell(f"{test.difference:+.1f}", test.difference, f"[{test.low:+.1f}, {test.high:+.1f}]", mark),
            Cell(f"{test.p_value:.3f}", test.p_value),
        ]
        made_of |= dict.fromkeys(f"{100 * each.skip_rate:.1f} %" for each in sets if each is not None)
    return [value, *groups, Cell(" and ".join(sorted(made_of, key=lambda each: float(each[:-2]))))]


def _absent(
    cells: Cells,
    task: str,
    model: str,
    run: Run,
    other: Run,
    lora: bool,
    sets: tuple[Match | None, Match | None],
    by_token: bool,
) -> list[Cell]:
    """Cells of a comparison that lacks a run: the reference's own, or the set next to its rate."""
    match, reason = cells.find(run, lora)
    measured = None if match is None else match.rate_by_token if by_token else match.skip_rate
    if match is None or measured is None:
        return [missing_cell(reason or "not measured", run), *[Cell()] * 3]
    layers = match.records[0].node["num_layers"]
    whole = int(measured * layers + 1e-9)
    # Next to the set that there is: that may be of fewer seeds than the rate here.
    if sets[0] is not None:
        whole = round(sets[0].skip_rate * layers) + 1
    elif sets[1] is not None:
        whole = round(sets[1].skip_rate * layers) - 1
    missing = at_rate(cells.config.scale, task, model, other.method, whole / layers)
    rate = Cell(f"{100 * measured:.1f} %", 100 * measured, kind="rate")
    return [rate, missing_cell("no run", missing), *[Cell()] * 2]


def ablations(cells: Cells) -> Table:
    """One setting changed at a time, against the unchanged method."""
    scale = cells.config.scale
    task = next(iter(scale.tasks))
    metric = HEADLINE[task]
    columns = [Column("Setting"), Column("Value")]
    for group in ("Router", "Router + LoRA"):
        columns += [Column("skip", group), Column(METRICS[metric], group), Column("perplexity", group)]
    rows = []
    reference = ablation_runs(scale, cells.config.ablation_level, cells.config.reference)[0][2]
    for group, name, run in ablation_runs(scale, cells.config.ablation_level, cells.config.reference):
        row = [Cell(group), Cell(method_title(name) if group == "default" else name)]
        for lora in (False, True):
            match, _ = cells.find(run, lora)
            perplexity = match.mean("perplexity") if match else None
            row += [
                rate_cell(cells, run, lora),
                score_cell(*cells.score(run, lora, metric, None if run.level is None else reference), run),
                Cell() if perplexity is None else Cell(f"{perplexity:.3f}", perplexity, kind="rate"),
            ]
        rows.append(row)
    caption = (
        f"{scale.tasks[task]}, {100 * scale.levels[cells.config.ablation_level]:g} % of the layers: the default method "
        "with one setting changed. Marks: paired test against the default. Rows of β are of the paper's form at a "
        "fixed α, at whatever rate that skips, and are not tested."
    )
    return Table("ablations", "Ablations", columns, rows, caption, section="Analysis")


def adaptivity(cells: Cells) -> Table:
    """How much the routes differ between prompts, and what that is worth."""
    scale = cells.config.scale
    model, planned = next(iter(scale.models)), _planned(cells)
    columns = [Column(name) for name in ("Task", "Level", "Method", "LoRA", "skip", "skip, over tokens")]
    columns += [Column("different routes", "routes"), Column("entropy, bits", "routes")]
    columns += [Column("like most frequent", "routes"), Column("like static set", "routes")]
    columns += [Column("value", "headline metric"), Column("gap to oracle", "headline metric")]
    methods = [name for name in ("first_soft", "first", "static_first", "sleb", "oracle") if name in scale.methods]
    rows = []
    for task, ours in scale.tasks.items():
        for level in sorted({level for method in methods for level in planned[task, method]}):
            for method in (each for each in methods if level in planned[task, each]):
                run = run_of(scale, task, model, method, level)
                ceiling = run_of(scale, task, model, "oracle", level) if "oracle" in methods else None
                for lora in (False, True):
                    match, reason = cells.find(run, lora)
                    rate = Cell(f"{100 * scale.levels[level]:g} %", 100 * scale.levels[level])
                    row = [Cell(ours), rate, Cell(method_title(method)), Cell("+ LoRA" if lora else "–")]
                    row.append(rate_cell(cells, run, lora))
                    if match is None:
                        rows.append([*row, missing_cell(reason, run), *[Cell()] * 6])
                        continue
                    by_token = match.rate_by_token
                    row.append(
                        Cell(note="not measured")
                        if by_token is None
                        else Cell(f"{100 * by_token:.1f} %", 100 * by_token, kind="rate")
                    )
                    row += [_number(match, "unique_routes", 0), _number(match, "route_entropy_bits", 2)]
                    row += [_number(match, "mode_agreement", 3), _number(match, "static_agreement", 3)]
                    score, reason = cells.score(run, lora, HEADLINE[task])
                    best, _ = cells.score(ceiling, lora, HEADLINE[task]) if ceiling else (None, "")
                    row.append(score_cell(score, reason, run))
                    same = ceiling is not None and method != "oracle" and cells.on_same_prompts(run, ceiling, lora)
                    gap = best.value - score.value if best and score and same else None
                    rows.append([*row, Cell() if gap is None else Cell(f"{gap:.1f}", gap)])
    caption = (
        "Skip rates are means over prompts; over tokens, prompts with long references weigh more. "
        "Agreement: share of layers decided alike, mean over prompts; the static set is the greedily calibrated one. "
        "The oracle chooses each prompt's layers with the reference in hand: no router can know them."
    )
    return Table("adaptivity", "Adaptivity", columns, rows, caption, section="Analysis")


def _number(match: Match, key: str, digits: int) -> Cell:
    value = match.mean("skip", key)
    return Cell(note="not measured") if value is None else Cell(f"{value:.{digits}f}", value, kind="ours")


def difficulty(cells: Cells) -> Table:
    """Skip rate and perplexity against the prompts' difficulty."""
    return _by_group(cells, "difficulty", "Skip rate and perplexity against difficulty", "difficulty")


def length(cells: Cells) -> Table:
    """Skip rate and perplexity against the prompts' length."""
    return _by_group(cells, "length", "Skip rate and perplexity against length", "prompt_tokens")


def _by_group(cells: Cells, key: str, title: str, name: str) -> Table:
    scale = cells.config.scale
    model, level = next(iter(scale.models)), cells.config.ablation_level
    columns = [Column(x) for x in ("Task", "Method", "LoRA", key, "prompts", "skip", "perplexity", "dense perplexity")]
    rows: list[list[Cell]] = []
    panels = []
    for task, ours in scale.tasks.items():
        curves: list[pictures.Curve] = []
        for method in (each for each in ("first_soft", "first", "sleb") if each in scale.methods):
            for lora in (False, True):
                run, base_run = run_of(scale, task, model, method, level), run_of(scale, task, model, "none", 0)
                match, _ = cells.find(run, lora)
                dense = cells.find(base_run, lora)[0] if cells.on_same_prompts(run, base_run, lora) else None
                found = [] if match is None else list(_groups(match, dense, name))
                points: list[tuple[float, float, float | None, float | None]] = []
                for label, where, count, rate, perplexity, base in found:
                    row = [Cell(ours), Cell(method_title(method)), Cell("+ LoRA" if lora else "–"), Cell(label, where)]
                    row += [Cell(str(count), count), Cell(f"{100 * rate:.1f} %", 100 * rate, kind="ours")]
                    row += [_perplexity(perplexity), _perplexity(base)]
                    rows.append(row)
                    points.append((where, 100 * rate, None, None))
                if points and lora:
                    curves.append((method, method_title(method) + " + LoRA", points))
        if curves:
            panels.append(
                (ours, "difficulty level" if key == "difficulty" else "prompt tokens", "skip rate (%)", curves)
            )
    picture = pictures.lines(panels) if panels else ""
    caption = (
        f"First seed, {100 * scale.levels[level]:g} % level. Perplexity of the reference when its tokens decode under "
        "each prompt's route, and by the dense model with the same LoRA setting. "
        "Without per-prompt numbers, less is shown."
    )
    return Table(key, title, columns, rows, caption, section="Analysis", picture=picture)


def _groups(
    match: Match, dense: Match | None, name: str
) -> Iterator[tuple[str, float, int, float, float | None, float | None]]:
    """(label, place on the axis, prompts, skip rate, perplexity, dense perplexity) of each group of prompts."""
    record = match.records[0]
    keys, rates = column(record, match.variant, name), column(record, match.variant, "skip_rate")
    if keys is None or rates is None:
        if name == "difficulty":
            for label, group in match.parts[0]["skip"].get("by_difficulty", {}).items():
                yield label, float(label), group["n"], group["skip_rate"], None, None
        return
    if name == "difficulty":
        groups = [(f"{value:g}", keys == value) for value in np.unique(keys)]
    else:
        order = np.array_split(np.argsort(keys, kind="stable"), _LENGTH_GROUPS)
        chosen = [np.isin(np.arange(len(keys)), each) for each in order if len(each)]
        groups = [(f"{keys[each].min():g}–{keys[each].max():g}", each) for each in chosen]
    for label, members in groups:
        base = None if dense is None else _perplexity_of(dense, members)
        place = float(keys[members].mean())
        yield label, place, int(members.sum()), float(rates[members].mean()), _perplexity_of(match, members), base


def _perplexity_of(match: Match, members: np.ndarray) -> float | None:
    record = match.records[0]
    nll, tokens = column(record, match.variant, "nll"), column(record, match.variant, "response_tokens")
    if nll is None or tokens is None or len(nll) != len(members) or not tokens[members].sum():
        return None
    return float(np.exp(nll[members].sum() / tokens[members].sum()))


def _perplexity(value: float | None) -> Cell:
    return Cell(note="not measured") if value is None else Cell(f"{value:.3f}", value, kind="ours")


def every_run(cells: Cells) -> Table:
    """All recorded runs of the scale's models, also those that stand for no cell: other tasks, other settings."""
    models = set(cells.config.scale.models.values())
    columns = [Column(name) for name in ("Model", "Task", "Method", "Variant", "Level asked for", "Seed", "skip")]
    columns += [
        Column("Metric"),
        Column("Value"),
        Column("Perplexity"),
        Column("TPOT ratio"),
        Column("In the tables above"),
    ]
    rows = []
    records = [each for each in cells.library.records if each.node["model"] in models]
    for record in sorted(records, key=lambda each: (each.node["model"], each.node["data"], str(each.file))):
        node = record.node
        for name, part in node["variants"].items():
            metric = part.get("primary_metric") or next(iter(part["metrics"]))
            found, ratio = part["metrics"][metric], (part.get("timing") or {}).get("tpot_ratio")
            perplexity, rate = part.get("perplexity"), 100 * part["skip"]["skip_rate"]
            rows.append(
                [
                    Cell(node["model"]), Cell(node["data"]), Cell(method_title(node["method"])),
                    Cell(ROW_NAMES.get(name, name)),
                    Cell(record.level), Cell(str(record.seed), record.seed), Cell(f"{rate:.1f} %", rate),
                    Cell(METRICS.get(metric, metric)),
                    Cell(f"{found['value']:.1f}", found["value"], _interval(found), kind="ours"),
                    Cell() if perplexity is None else Cell(f"{perplexity:.3f}", perplexity),
                    Cell() if ratio is None else Cell(f"{ratio:.2f}x", ratio),
                    Cell("yes" if record in cells.used else "no", note=str(record.file)),
                ]
            )  # fmt: skip
    return Table("runs", "Every recorded run", columns, rows, "One row per variant of a run.", section="Analysis")


def _interval(found: dict[str, float]) -> str:
    return f"[{found['low']:.1f}, {found['high']:.1f}]" if "low" in found else ""


def _planned(cells: Cells) -> dict[tuple[str, str], list[int]]:
    """The levels at which the grid plans runs of the first model, by task and method, ascending.

    One of the paper's levels per skip rate of ours. Where a scale has none of the paper's levels, all that it has.
    """
    scale = cells.config.scale
    plan = planned_runs(scale)
    model = next(iter(scale.models))
    first = {rate: level for level, rate in sorted(scale.levels.items(), reverse=True)}
    levels = [first[rate] for rate in sorted(first)]
    found = {}
    for task in scale.tasks:
        for method in scale.methods:
            wanted = [level for level in levels if run_of(scale, task, model, method, level) in plan]
            found[task, method] = wanted or levels
    return found
