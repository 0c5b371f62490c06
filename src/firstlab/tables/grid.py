"""The grid: which runs the tables need, and the command that makes each.

This is the one declaration that cells and sweeps share: `planned_runs` lists every run with the tables it serves.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from firstlab.config.compose import conf_dir, own_conf_dirs, search_path
from firstlab.store import paper
from firstlab.store.paper import QualityTable
from firstlab.tables.config import ScaleConfig, TablesConfig

#: Further methods for the detailed tables, behind the paper's own.
PAPER_METHODS = ("none", "skip_decode", "random_skip", "unified_skip", "first_soft", "first")
#: FiRST, the paper's form and ours: the rows of the paper's tables of times and layers.
FIRST = ("first_soft", "first")


@dataclass(frozen=True)
class Run:
    """One run of `firstlab.train`.

    Attributes:
        task, model, method: Names of files in conf/data, conf/model and conf/method.
        level: Skip rate that is asked for, 0 for the dense model, None where none is asked for.
        overrides: What the command line says, without the seed.
        changes: The part of `overrides` by which an ablation differs from the method's defaults.
    """

    task: str
    model: str
    method: str
    level: float | None
    overrides: tuple[str, ...] = field(compare=False)
    changes: tuple[str, ...] = ()

    def command(self, seed: int = 0) -> str:
        """Ready for a shell."""
        own = search_path(own_conf_dirs())
        return shlex.join(["python", "-m", "firstlab.train", *own, *self.overrides, f"seed={seed}"])


def known_methods(scale: ScaleConfig) -> list[str]:
    """Methods of the scale that this version has, in order."""
    folders = [Path(each) / "method" for each in (conf_dir(), *own_conf_dirs())]
    return [name for name in scale.methods if any((each / f"{name}.yaml").is_file() for each in folders)]


def quality_of(scale: ScaleConfig) -> list[QualityTable]:
    """The paper's quality tables: what the scale stands for of them, their models, tasks and levels."""
    tables = []
    for table in paper.quality_tables().values():
        tasks = tuple(task for task in table.tasks if task in scale.tasks)
        rows = {key: row for key, row in table.rows.items() if key[0] in (0, *scale.levels)}
        narrowed = replace(table, tasks=tasks, rows=rows)
        if table.model in scale.models and tasks and narrowed.levels:
            tables.append(narrowed)
    return tables


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
    """The run behind a cell.

    Args:
        scale: Says what stands for the paper's names.
        task, model: The paper's.
        method: A method of the scale.
        level: The paper's skip level in percent; 0 for the dense model.
        changes: Further overrides.

    Raises:
        ValueError: The scale has nothing for one of them.
    """
    for option, wanted, known in (("tasks", task, scale.tasks), ("models", model, scale.models)):
        if wanted not in known:
            raise ValueError(f"scale.{option} has no entry for {wanted!r}; it has {', '.join(known)}")
    if level and level not in scale.levels:
        raise ValueError(f"scale.levels has no entry for {level}; it has {', '.join(map(str, scale.levels))}")
    if method not in scale.methods:
        raise ValueError(f"scale.methods has no entry for {method!r}; it has {', '.join(scale.methods)}")
    rate = scale.levels[level] if level else 0.0
    return _run_at(scale, task, model, method, rate, scale.alphas.get(level, 0), changes)


def at_rate(scale: ScaleConfig, task: str, model: str, method: str, rate: float) -> Run:
    """As `run_of`, at any skip rate of a method that takes one."""
    return _run_at(scale, task, model, method, rate, 0, ())


def _run_at(
    scale: ScaleConfig, task: str, model: str, method: str, rate: float, alpha: float, changes: tuple[str, ...]
) -> Run:
    fill = {"level": f"{rate:.12g}", "alpha": f"{alpha:.12g}"}
    named = [f"model={scale.models[model]}", f"data={scale.tasks[task]}"]
    own = [each.format_map(fill) for each in scale.methods[method]]
    overrides = (*scale.base, *named, *own, *changes)
    return Run(scale.tasks[task], scale.models[model], method, rate, overrides, changes)


def level_keys(scale: ScaleConfig) -> set[str]:
    """Keys that set a skip level; runs that differ in them alone belong to one method."""
    templates = [each for overrides in scale.methods.values() for each in overrides if "{" in each]
    return {each.partition("=")[0] for each in templates}


def methods_of(number: str, scale: ScaleConfig) -> list[str]:
    """Rows of a quality table: the paper's methods and ours in the main tables, all of them in the detailed ones."""
    detailed = number in ("9", "10", "11", "12", "13a", "13b", "14a", "14b")
    return [name for name in scale.methods if detailed or name in (*PAPER_METHODS, "sleb")]


def ablation_runs(config: TablesConfig) -> list[tuple[str, str, Run]]:
    """(group, name, run) of every ablation, the unchanged method first; none if the scale makes none."""
    scale, task, model = config.scale, next(iter(config.scale.tasks)), config.scale.ablation_model
    if model is None:
        return []

    def run(changes: tuple[str, ...] = (), method: str | None = None) -> Run:
        if method is None:
            return run_of(scale, task, model, config.reference, config.ablation_level, changes)
        named = (f"model={scale.models[model]}", f"data={scale.tasks[task]}", f"method={method}")
        return Run(scale.tasks[task], scale.models[model], method, None, (*scale.base, *named, *changes), changes)

    rows = [("default", config.reference, run())]
    for each in config.ablations:
        changes = [part for item in each.overrides for part in (scale.all_steps if item == "{all_steps}" else [item])]
        rows.append((each.group, each.name, run(tuple(changes), each.method)))
    return rows


def planned_runs(config: TablesConfig) -> dict[Run, list[str]]:
    """Every run that some table needs, with the names of those tables, main tables first."""
    plan: dict[Run, list[str]] = {}
    known = known_methods(config.scale)
    for name, run in _needs(config):
        if run.method not in known:
            continue
        tables = plan.setdefault(run, [])
        if name not in tables:
            tables.append(name)
    return plan


def _needs(config: TablesConfig) -> Iterator[tuple[str, Run]]:
    scale = config.scale
    for table in quality_of(scale):
        for task in table.tasks:
            for method in methods_of(table.number, scale):
                for level in [0] if method == "none" else table.levels:
                    yield f"table{table.number}", run_of(scale, task, table.model, method, level)
    for number, node in tpot_of(scale).items():
        for task, ratios in node["tasks"].items():
            for method in (name for name in FIRST if name in scale.methods):
                for level in ratios:
                    yield f"table{number}", run_of(scale, task, node["model"], method, level)
    for _, _, run in ablation_runs(config):
        yield "ablations", run
