"""The grid of planned runs: what the paper's tables need and what sweeps add, from one file of conf/scale."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

from omegaconf import MISSING

from firstlab.config.compose import own_conf_dirs, search_path
from firstlab.store import paper
from firstlab.store.paper import QualityTable

#: The paper's methods; the detailed tables show the others of a scale behind them.
PAPER_METHODS = ("none", "skip_decode", "random_skip", "unified_skip", "first_soft", "first")
#: FiRST, the paper's form and ours: the rows of the paper's tables of times and layers.
FIRST = ("first_soft", "first")


@dataclass
class AblationConfig:
    """One row of the ablation table."""

    group: str = MISSING  # the setting
    name: str = MISSING  # its value
    overrides: list[str] = field(default_factory=list)  # of the default method
    method: str | None = None  # instead of it, with no level asked for: it skips whatever the overrides say


@dataclass
class ScaleConfig:
    """What stands for the paper's models, tasks and levels; tables of those that it lacks are left out."""

    name: str = MISSING  # of the file, and of the folder of its tables
    base: list[str] = field(default_factory=list)  # overrides that every run starts with
    models: dict[str, str] = MISSING  # paper's model to ours (conf/model)
    tasks: dict[str, str] = MISSING  # paper's task to ours (conf/data)
    levels: dict[int, float] = MISSING  # paper's skip level in percent to the skip rate that we ask for
    alphas: dict[int, float] = field(default_factory=dict)  # the same to α, for methods that take α
    methods: dict[str, list[str]] = MISSING  # overrides per method; {level} and {alpha} are filled in
    ablation_model: str | None = None  # which of the paper's models the ablations are made with, on the first task
    all_steps: list[str] = field(default_factory=list)  # overrides that give the LoRA phase the steps of both phases
    ablations: list[AblationConfig] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError with the option's full name."""
        tables = paper.quality_tables().values()
        papers = {"models": [each.model for each in tables], "tasks": [task for each in tables for task in each.tasks]}
        for option, theirs in papers.items():
            ours = getattr(self, option)
            if not ours or set(ours) - set(theirs):
                wrong = f"{min(set(ours) - set(theirs))!r} is not the paper's" if ours else "it is empty"
                known = ", ".join(dict.fromkeys(theirs))
                raise ValueError(f"scale.{option}={dict(ours)}: {wrong}; say what stands for any of {known}")
        if "none" not in self.methods:
            raise ValueError("scale.methods has no entry for 'none': every table compares with the dense model")
        if self.ablation_model is not None and self.ablation_model not in self.models:
            raise ValueError(f"scale.ablation_model={self.ablation_model!r}: choose one of {', '.join(self.models)}")
        for level, rate in self.levels.items():
            if not 0 < rate < 1:
                raise ValueError(f"scale.levels.{level}={rate} is not a skip rate: strictly between 0 and 1")
        missing = sorted(set(self.levels) - set(self.alphas))
        for method, overrides in self.methods.items():
            if missing and any("{alpha}" in each for each in overrides):
                raise ValueError(f"scale.methods.{method} takes an α, and scale.alphas has none for {missing}")

    def entry(self, option: str, key: Any) -> Any:
        """What the scale has for a model, task, level or method; raises ValueError if that is nothing."""
        known = getattr(self, option)
        if key not in known:
            raise ValueError(f"scale.{option} has no entry for {key!r}; it has {', '.join(map(str, known))}")
        return known[key]


@dataclass
class CellsConfig:
    """Runs of a sweep: of tables, of ablations, or else every model, task, method and rate with each other."""

    tables: list[str] = field(default_factory=list)  # of the paper; table3 stands for 3a and 3b
    ablations: list[int] = field(default_factory=list)  # paper's levels in percent
    models: list[str] = field(default_factory=list)  # ours; [] for all of the scale. They narrow the tables
    tasks: list[str] = field(default_factory=list)  # the same
    methods: list[str] = field(default_factory=list)  # the same, but required without tables and ablations
    rates: list[float] = field(default_factory=list)  # skip rates; the dense model has none
    seeds: list[int] = field(default_factory=lambda: [0])
    changes: list[list[str]] = field(default_factory=lambda: [[]])  # further overrides, a run for each list


@dataclass(frozen=True)
class Run:
    """One run of `firstlab.train`."""

    task: str  # of conf/data
    model: str  # of conf/model
    method: str  # of conf/method
    level: float | None  # skip rate that is asked for, 0 for the dense model
    overrides: tuple[str, ...] = field(compare=False)  # what the command line says, without the seed
    changes: tuple[str, ...] = ()  # those of them by which an ablation differs from the method's defaults

    def command(self, seed: int = 0) -> str:
        """Ready for a shell."""
        own = search_path(own_conf_dirs())
        return shlex.join(["python", "-m", "firstlab.train", *own, *self.overrides, f"seed={seed}"])


def quality_of(scale: ScaleConfig) -> list[QualityTable]:
    """The paper's quality tables: what the scale stands for of them, their models, tasks and levels."""
    tables = [
        replace(
            table,
            tasks=tuple(task for task in table.tasks if task in scale.tasks),
            rows={key: row for key, row in table.rows.items() if key[0] in (0, *scale.levels)},
        )
        for table in paper.quality_tables().values()
    ]
    return [each for each in tables if each.model in scale.models and each.tasks and each.levels]


def tpot_of(scale: ScaleConfig) -> dict[str, dict[str, Any]]:
    """The paper's tables of times, as `quality_of`: number to title, model and the ratios of each task and level."""
    tables = {}
    for number, node in paper.read()["tpot"].items():
        tasks = {
            task: {level: ratio for level, ratio in ratios.items() if level in scale.levels}
            for task, ratios in node["tasks"].items()
            if task in scale.tasks
        }
        if node["model"] in scale.models and any(tasks.values()):
            tables[number] = {**node, "tasks": tasks}
    return tables


def run_of(scale: ScaleConfig, task: str, model: str, method: str, level: int, changes: tuple[str, ...] = ()) -> Run:
    """The run behind a cell of the paper's tables, at its skip level in percent, 0 for dense."""
    rate = scale.entry("levels", level) if level else 0.0
    return at_rate(scale, task, model, method, rate, scale.alphas.get(level, 0), changes)


def at_rate(
    scale: ScaleConfig, task: str, model: str, method: str, rate: float, alpha: float = 0, changes: tuple[str, ...] = ()
) -> Run:
    """As `run_of`, at any skip rate of a method that takes one."""
    fill = {"level": f"{rate:.12g}", "alpha": f"{alpha:.12g}"}
    data, base = scale.entry("tasks", task), scale.entry("models", model)
    own = [each.format_map(fill) for each in scale.entry("methods", method)]
    return Run(data, base, method, rate, (*scale.base, f"model={base}", f"data={data}", *own, *changes), changes)


def level_keys(scale: ScaleConfig) -> set[str]:
    """Keys that set a skip level; runs that differ in them alone belong to one method."""
    return {each.partition("=")[0] for overrides in scale.methods.values() for each in overrides if "{" in each}


def methods_of(number: str, scale: ScaleConfig) -> list[str]:
    """Rows of a quality table: the paper's methods and ours in the main tables, all of them in the detailed ones."""
    detailed = number in ("9", "10", "11", "12", "13a", "13b", "14a", "14b")
    return [name for name in scale.methods if detailed or name in (*PAPER_METHODS, "sleb")]


def ablation_runs(scale: ScaleConfig, level: int, reference: str = "first") -> list[tuple[str, str, Run]]:
    """(group, name, run) of every ablation at a level of the paper, the unchanged method first."""
    model = scale.ablation_model
    if model is None:
        return []
    task = next(iter(scale.tasks))
    rows = [("default", reference, run_of(scale, task, model, reference, level))]
    for each in scale.ablations:
        parts = [scale.all_steps if item == "{all_steps}" else [item] for item in each.overrides]
        run = run_of(scale, task, model, reference, level, tuple(chain.from_iterable(parts)))
        if each.method is not None:
            named = (f"model={run.model}", f"data={run.task}", f"method={each.method}")
            run = replace(run, method=each.method, level=None, overrides=(*scale.base, *named, *run.changes))
        rows.append((each.group, each.name, run))
    return rows


def planned_runs(scale: ScaleConfig) -> dict[Run, list[str]]:
    """Every run that a table of the paper needs, with the names of those tables, main tables first."""
    cells = [
        (table.number, task, table.model, method, level)
        for table in quality_of(scale)
        for task, method in product(table.tasks, methods_of(table.number, scale))
        for level in ([0] if method == "none" else table.levels)
    ]
    cells += [
        (number, task, node["model"], method, level)
        for number, node in tpot_of(scale).items()
        for task, ratios in node["tasks"].items()
        for method, level in product([name for name in FIRST if name in scale.methods], ratios)
    ]
    plan: dict[Run, list[str]] = {}
    for number, task, model, method, level in cells:
        tables = plan.setdefault(run_of(scale, task, model, method, level), [])
        if f"table{number}" not in tables:
            tables.append(f"table{number}")
    return plan


def sweep_runs(scale: ScaleConfig, cells: CellsConfig) -> list[dict[str, str]]:
    """The overrides of every run of a sweep, by key."""
    return [
        dict(item.split("=", 1) for item in (*run.overrides, *changes, f"seed={seed}"))
        for run, changes, seed in product(_chosen(scale, cells), cells.changes, cells.seeds)
    ]


def _chosen(scale: ScaleConfig, cells: CellsConfig) -> list[Run]:
    if cells.ablations:
        return [run for level in cells.ablations for _, _, run in ablation_runs(scale, level)]
    chosen = []
    for run, tables in planned_runs(scale).items() if cells.tables else ():
        named = any(table.rstrip("ab") in cells.tables or table in cells.tables for table in tables)
        wanted = ((run.model, cells.models), (run.task, cells.tasks), (run.method, cells.methods))
        fits = not cells.rates or not run.level or run.level in cells.rates
        if named and fits and all(not names or name in names for name, names in wanted):
            chosen.append(run)
    ours = {model: paper_model for paper_model, model in reversed(scale.models.items())}
    for model, task, method in product(cells.models or ours, scale.tasks, () if cells.tables else cells.methods):
        if not cells.tasks or scale.tasks[task] in cells.tasks:
            for rate in [0.0] if method == "none" else cells.rates:
                chosen.append(at_rate(scale, task, ours.get(model, model), method, rate))
    if not chosen:
        raise ValueError(f"hydra.sweeper.cells: {cells} is no run of the scale {scale.name}")
    return chosen
