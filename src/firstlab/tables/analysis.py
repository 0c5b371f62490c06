"""Tables beyond the paper's: ablations, adaptivity, difficulty and length, every recorded run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from firstlab.config.grid import Run, ablation_runs, at_rate, planned_runs
from firstlab.store.results import ROW_NAMES, harness_scores
from firstlab.tables import pictures
from firstlab.tables.cells import Cells, Match, Score, column
from firstlab.tables.printed import HEADLINE, METRICS, method_title, missing_cell, rate_cell, score_cell
from firstlab.tables.table import LORA, Cell, Column, Table, columns, interval, number, percent

#: Methods that skip one set of layers whatever the prompt.
STATIC = ("random_skip", "unified_skip", "sleb")
#: Metrics of lm-evaluation-harness, the first of a task's stands in the table.
_QUOTED = ("acc_norm", "acc", "exact_match", "f1", "perplexity", "word_perplexity")
_HARNESS = (
    "python -m firstlab.hub lm_eval --model firstlab --model_args pretrained=RUN --tasks hellaswag,arc_easy,wikitext "
    "--output_path runs/lm_eval"
)
#: Groups of equally many prompts in the table of lengths.
_LENGTH_GROUPS = 4


def pareto(cells: Cells) -> Table:
    """Quality against measured skip rate: one picture per task, with LoRA and without, and its numbers."""
    scale, planned = cells.scale, _planned(cells)
    panels, rows = [], []
    for task, lora in product(scale.tasks, (False, True)):
        ours, metric = scale.tasks[task], HEADLINE[task]
        curves: list[pictures.Curve] = []
        base, _ = cells.score(cells.run(task, "none", 0), lora, metric)
        for method in scale.methods:
            points = [] if base is None or method == "none" else [_point(base)]
            runs = dict.fromkeys(cells.run(task, method, level) for level in planned[task, method])
            # A run that stands for two levels is one point.
            for score in filter(None, dict.fromkeys(cells.score(run, lora, metric)[0] for run in runs)):
                points.append(_point(score))
                row = [Cell(ours), Cell(method_title(method)), LORA[lora], percent(score.skip_rate)]
                detail = interval(score.low, score.high)
                rows.append([*row, Cell(f"{score.value:.1f}", score.value, detail, kind="ours")])
            if len(points) > 1 or (method == "none" and points):
                curves.append((method, method_title(method), sorted(points)))
        if curves:
            panels.append((f"{ours}, {'with' if lora else 'without'} LoRA", METRICS[metric], curves))
    caption = "Bars are bootstrap intervals. Lines start at the dense model. Skip rates are measured."
    heads = columns("Task", "Method", "LoRA", "skip", "headline metric")
    picture = pictures.quality_against_skip(panels) if panels else ""
    return Table("pareto", "Quality against skip rate", heads, rows, caption, section="Overview", picture=picture)


def _point(score: Score) -> pictures.Point:
    return 100 * score.skip_rate, score.value, score.low, score.high


def equal_rates(cells: Cells) -> Table:
    """The reference beside each static set at exactly the rate that it skips, over prompts and over tokens."""
    scale, reference, planned = cells.scale, cells.config.reference, _planned(cells)
    heads = [*columns("Task", "Level", "LoRA", "Other method"), Column("value", method_title(reference))]
    for group in ("rate over prompts", "rate over tokens"):
        heads += columns("both skip", "other method", "difference", "p", group=group)
    heads += columns("sets of the other method")
    rows, methods = [], [each for each in STATIC if each in scale.methods]
    for task, ours in scale.tasks.items():
        for level, lora, method in product(planned[task, reference], (False, True), methods):
            run, other = cells.run(task, reference, level), cells.run(task, method, level)
            row = [Cell(ours), percent(scale.levels[level], "g"), LORA[lora], Cell(method_title(method))]
            rows.append([*row, *_compared(cells, task, run, other, lora)])
    caption = (
        "A static set skips whole layers for every prompt, so it meets a rate in between by taking one layer more for "
        f"a share of the prompts: that is what {method_title(reference)} is compared with here, by its measured rate. "
        "Over tokens, prompts with long responses weigh more: decode time follows that rate, and the comparison is "
        f"stricter where {method_title(reference)} skips less for them. "
        "Differences are paired over test prompts; marks are theirs."
    )
    return Table("equal_rates", "At equal skip rates", heads, rows, caption, section="Overview")


def _compared(cells: Cells, task: str, run: Run, other: Run, lora: bool) -> list[Cell]:
    """The reference's value, the comparison at either of its rates, and the sets that the other method needed."""
    value, groups, made_of = Cell(), [], set[float]()
    for by_token in (False, True):
        found, sets = cells.at_rate_of(run, other, lora, HEADLINE[task], by_token)
        if found is None:
            groups += _absent(cells, task, run, other, lora, sets, by_token)
            continue
        seeds = "" if found.seeds == 1 else f"{found.seeds} seeds"
        value = Cell(f"{found.value:.1f}", found.value, seeds, kind="ours")
        test, mark = found.test, cells.mark(found.test)
        difference = Cell(f"{test.difference:+.1f}", test.difference, interval(test.low, test.high, "+.1f"), mark)
        groups += [percent(found.skip_rate), number(found.other), difference, number(test.p_value, ".3f", "")]
        made_of |= {each.skip_rate for each in sets if each is not None}
    return [value, *groups, Cell(" and ".join(dict.fromkeys(f"{100 * rate:.1f} %" for rate in sorted(made_of))))]


def _absent(
    cells: Cells, task: str, run: Run, other: Run, lora: bool, sets: tuple[Match | None, Match | None], by_token: bool
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
    missing = at_rate(cells.scale, task, cells.model, other.method, whole / layers)
    return [percent(measured), missing_cell("no run", missing), *[Cell()] * 2]


def ablations(cells: Cells) -> Table:
    """One setting changed at a time, against the unchanged method."""
    scale, config = cells.scale, cells.config
    task = next(iter(scale.tasks))
    metric = HEADLINE[task]
    heads = columns("Setting", "Value")
    for group in ("Router", "Router + LoRA"):
        heads += columns("skip", METRICS[metric], "perplexity", group=group)
    rows = []
    runs = ablation_runs(scale, config.ablation_level, config.reference)
    for group, name, run in runs:
        row = [Cell(group), Cell(method_title(name) if group == "default" else name)]
        for lora in (False, True):
            match, _ = cells.find(run, lora)
            perplexity = match.mean("perplexity") if match else None
            score = cells.score(run, lora, metric, None if run.level is None else runs[0][2])
            row += [rate_cell(cells, run, lora), score_cell(*score, run)]
            row.append(Cell() if perplexity is None else number(perplexity, ".3f", "rate"))
        rows.append(row)
    caption = (
        f"{scale.tasks[task]}, {100 * scale.levels[config.ablation_level]:g} % of the layers: the default method "
        "with one setting changed. Marks: paired test against the default. Rows of β are of the paper's form at a "
        "fixed α, at whatever rate that skips, and are not tested."
    )
    return Table("ablations", "Ablations", heads, rows, caption, section="Analysis")


def harness(cells: Cells) -> Table:
    """What lm-evaluation-harness measured, one row per model and skip rate, one column per task."""
    heads = columns("Model", "Trained on", "Level", "LoRA", "asked", "skip")
    models = {None, *cells.scale.models.values()}  # None: of a folder outside of runs
    found = [each for each in cells.library.harness if _routed(each).get("model") in models]
    tasks = list(dict.fromkeys(task for each in found for task in each["results"]))
    shown = {task: _harness_metric([each["results"].get(task, {}) for each in found]) for task in tasks}
    heads += [Column(metric, task) for task, metric in shown.items()]
    rows = []
    for each in sorted(found, key=_harness_order):
        model, name = _routed(each), Path(each.get("model_name", "")).name
        row = [Cell(method_title(model["method"]) if "method" in model else name)]
        row += [Cell(model.get(text) or "") for text in ("data", "level")]
        row.append(LORA[model.get("variant", "").endswith("_lora")])
        rates = (model.get("skip_rate_asked"), "g"), (model.get("skip_rate"), ".1f")
        row += [Cell() if rate is None else percent(rate, form) for rate, form in rates]
        rows.append([*row, *(_harness_cell(each["results"].get(task, {}), shown[task]) for task in tasks)])
    if not rows:
        heads.append(Column("accuracy and perplexity"))
        rows.append([*[Cell() for _ in heads[1:]], Cell("no run", command=_HARNESS, kind="missing")])
    caption = (
        "Accuracy in percent, perplexity as it is; brackets: 95 % intervals, Wilson's for accuracy, else 1.96 of the "
        "harness's standard errors. Contexts run every layer, continuations the route, as in decode."
    )
    return Table("harness", "lm-evaluation-harness under skipping", heads, rows, caption, section="Quality")


def _routed(each: dict[str, Any]) -> dict[str, Any]:
    """What the harness's model `firstlab` said of itself; nothing of other models."""
    model: dict[str, Any] = each["config"].get("firstlab", {})
    return model


def _harness_order(each: dict[str, Any]) -> tuple[str, str, int, float]:
    model = _routed(each)
    return model.get("data", ""), model.get("method", ""), model.get("seed", 0), model.get("skip_rate", 0)


def _harness_metric(results: list[dict[str, Any]]) -> str:
    """Of a task's metrics, the one that is usually quoted."""
    names = [metric for each in results for metric, *_ in harness_scores(each)]
    return next((each for each in _QUOTED if each in names), names[0] if names else "")


def _harness_cell(values: dict[str, Any], metric: str) -> Cell:
    for name, value, low, high in harness_scores(values):
        if name == metric:
            factor, form = (1, ".3f") if "perplexity" in name or "bits" in name else (100, ".1f")
            detail = "" if low is None or high is None else interval(factor * low, factor * high, form)
            return Cell(f"{factor * value:{form}}", factor * value, detail, kind="ours")
    return Cell(note="not measured")


def adaptivity(cells: Cells) -> Table:
    """How much the routes differ between prompts, and what that is worth."""
    scale, planned = cells.scale, _planned(cells)
    heads = columns("Task", "Level", "Method", "LoRA", "skip", "skip, over tokens")
    heads += columns("different routes", "entropy, bits", "like most frequent", "like static set", group="routes")
    heads += columns("value", "gap to oracle", group="headline metric")
    methods = [name for name in ("first_soft", "first", "static_first", "sleb", "oracle") if name in scale.methods]
    rows = []
    for task, ours in scale.tasks.items():
        levels = sorted({level for method in methods for level in planned[task, method]})
        for level, method, lora in product(levels, methods, (False, True)):
            if level in planned[task, method]:
                run = cells.run(task, method, level)
                ceiling = cells.run(task, "oracle", level) if "oracle" in methods else None
                row = [Cell(ours), percent(scale.levels[level], "g"), Cell(method_title(method)), LORA[lora]]
                rows.append([*row, *_adapted(cells, task, run, ceiling, lora)])
    caption = (
        "Skip rates are means over prompts; over tokens, prompts with long references weigh more. "
        "Agreement: share of layers decided alike, mean over prompts; the static set is the greedily calibrated one. "
        "The oracle chooses each prompt's layers with the reference in hand: no router can know them."
    )
    return Table("adaptivity", "Adaptivity", heads, rows, caption, section="Analysis")


def _adapted(cells: Cells, task: str, run: Run, ceiling: Run | None, lora: bool) -> list[Cell]:
    match, reason = cells.find(run, lora)
    if match is None:
        return [rate_cell(cells, run, lora), missing_cell(reason, run), *[Cell()] * 6]
    row = [rate_cell(cells, run, lora), percent(match.rate_by_token)]
    shown = {"unique_routes": ".0f", "route_entropy_bits": ".2f", "mode_agreement": ".3f", "static_agreement": ".3f"}
    row += [number(match.mean(key, "skip"), form) for key, form in shown.items()]
    score, reason = cells.score(run, lora, HEADLINE[task])
    best, _ = cells.score(ceiling, lora, HEADLINE[task]) if ceiling else (None, "")
    same = ceiling is not None and run.method != "oracle" and cells.on_same_prompts(run, ceiling, lora)
    gap = best.value - score.value if best and score and same else None
    return [*row, score_cell(score, reason, run), Cell() if gap is None else number(gap, kind="")]


def by_group(cells: Cells, key: str, axis: str, name: str) -> Table:
    """Skip rate and perplexity against the prompts' difficulty or length."""
    scale, level = cells.scale, cells.config.ablation_level
    rows: list[list[Cell]] = []
    panels = []
    methods = [each for each in ("first_soft", "first", "sleb") if each in scale.methods]
    for task, ours in scale.tasks.items():
        curves: list[pictures.Curve] = []
        for method, lora in product(methods, (False, True)):
            run, base_run = cells.run(task, method, level), cells.run(task, "none", 0)
            match, _ = cells.find(run, lora)
            dense = cells.find(base_run, lora)[0] if cells.on_same_prompts(run, base_run, lora) else None
            points: list[pictures.Point] = []
            for label, where, count, rate, *perplexities in [] if match is None else _groups(match, dense, name):
                row = [Cell(ours), Cell(method_title(method)), LORA[lora], Cell(label, where)]
                row += [number(count, "d", ""), number(100 * rate, unit=" %")]
                rows.append([*row, *(number(each, ".3f") for each in perplexities)])
                points.append((where, 100 * rate, None, None))
            if points and lora:
                curves.append((method, method_title(method) + " + LoRA", points))
        if curves:
            panels.append((ours, axis, "skip rate (%)", curves))
    caption = (
        f"First seed, {100 * scale.levels[level]:g} % level. Perplexity of the reference when its tokens decode under "
        "each prompt's route, and by the dense model with the same LoRA setting. "
        "Without per-prompt numbers, less is shown."
    )
    heads = columns("Task", "Method", "LoRA", key, "prompts", "skip", "perplexity", "dense perplexity")
    picture = pictures.lines(panels) if panels else ""
    title = f"Skip rate and perplexity against {key}"
    return Table(key, title, heads, rows, caption, section="Analysis", picture=picture)


def _groups(
    match: Match, dense: Match | None, name: str
) -> Iterator[tuple[str, float, int, float, float | None, float | None]]:
    """(label, place on the axis, prompts, skip rate, perplexity, dense perplexity) of each group of prompts."""
    record = match.records[0]
    keys, rates = column(record, match.variant, name), column(record, match.variant, "skip_rate")
    if keys is None or rates is None:
        return
    if name == "difficulty":
        groups = [(f"{value:g}", keys == value) for value in np.unique(keys)]
    else:
        order = np.array_split(np.argsort(keys, kind="stable"), _LENGTH_GROUPS)
        chosen = [np.isin(np.arange(len(keys)), each) for each in order if len(each)]
        groups = [(f"{keys[each].min():g}–{keys[each].max():g}", each) for each in chosen]
    for label, members in groups:
        both = _perplexity_of(match, members), _perplexity_of(dense, members)
        yield label, float(keys[members].mean()), int(members.sum()), float(rates[members].mean()), *both


def _perplexity_of(match: Match | None, members: np.ndarray) -> float | None:
    names = ("nll", "response_tokens")
    nll, tokens = (None if match is None else column(match.records[0], match.variant, name) for name in names)
    if nll is None or tokens is None or len(nll) != len(members) or not tokens[members].sum():
        return None
    return float(np.exp(nll[members].sum() / tokens[members].sum()))


def every_run(cells: Cells) -> Table:
    """All recorded runs of the scale's models, also those that stand for no cell: other tasks, other settings."""
    heads = columns("Model", "Task", "Method", "Variant", "Level asked for", "Seed", "skip", "Metric", "Value")
    heads += columns("Perplexity", "TPOT ratio", "In the tables above")
    rows = []
    for record in sorted(cells.records, key=lambda each: (each.node["model"], each.node["data"], str(each.file))):
        node = record.node
        for name, part in node["variants"].items():
            metric = part["primary_metric"]
            found, ratio = part["metrics"][metric], part.get("timing", {}).get("tpot_ratio")
            perplexity, detail = part.get("perplexity"), interval(found["low"], found["high"])
            names = node["model"], node["data"], method_title(node["method"]), ROW_NAMES.get(name, name)
            row = [*map(Cell, (*names, record.level)), number(record.seed, "d", "")]
            row += [percent(part["skip"]["skip_rate"]), Cell(METRICS.get(metric, metric))]
            row.append(Cell(f"{found['value']:.1f}", found["value"], detail, kind="ours"))
            row.append(Cell() if perplexity is None else number(perplexity, ".3f", ""))
            row.append(Cell() if ratio is None else number(ratio, ".2f", "", "x"))
            rows.append([*row, Cell("yes" if record in cells.used else "no", note=str(record.file))])
    return Table("runs", "Every recorded run", heads, rows, "One row per variant of a run.", section="Analysis")


def _planned(cells: Cells) -> dict[tuple[str, str], list[int]]:
    """The levels of which the grid plans runs of the first model, by task and method; or all."""
    scale, plan = cells.scale, planned_runs(cells.scale)
    return {
        (task, method): [each for each in cells.levels if cells.run(task, method, each) in plan] or cells.levels
        for task, method in product(scale.tasks, scale.methods)
    }
