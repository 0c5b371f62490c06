"""Sweeps: grids become runs, a plan is printed, what is left is launched, and failures are listed at the end.

`hydra_plugins.firstlab_sweeper` calls `run_sweep` with what a file of conf/sweep names.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from firstlab.config.build import check_device
from firstlab.config.grid import CellsConfig, ScaleConfig, sweep_runs
from firstlab.config.schema import ExperimentConfig
from firstlab.methods.base import Method
from firstlab.run.directory import finished_record, is_trained, wanted_variants
from firstlab.run.load import load
from firstlab.store import results

Record = dict[str, Any]


def expand(grids: Mapping[str, Mapping[str, Any]], given: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The overrides of every run: grid after grid, the last key of a grid changing fastest.

    "{KEY}" in a value is the run's value of KEY. What is `given` on the command line narrows the grids that sweep the
    same key, or is one more axis of all.
    """
    axes = [{key: _texts(values) for key, values in grid.items()} for grid in grids.values()]
    swept: dict[str, list[str]] = defaultdict(list)
    for key, values in (each for grid in axes for each in grid.items()):
        swept[key] += values
    for key, wanted in given.items():
        known = dict.fromkeys(swept.get(key, wanted))
        if unknown := [value for value in wanted if value not in known]:
            raise ValueError(f"{key}={','.join(unknown)} is not in the sweep, which has {', '.join(known)}")
    everywhere = {key: list(values) for key, values in given.items() if key not in swept}
    runs: dict[tuple[str, ...], None] = {}
    for grid in axes or [{}]:
        narrowed = {key: [v for v in values if v in given.get(key, values)] for key, values in grid.items()}
        for chosen in product(*everywhere.values(), *narrowed.values()):
            run = dict(zip((*everywhere, *narrowed), chosen, strict=True))
            runs[tuple(f"{key}={_filled(value, run)}" for key, value in run.items())] = None
    return [list(run) for run in runs]


def with_cells(
    scale: Mapping[str, Any], cells: Mapping[str, Any], grids: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The runs that a sweep wants of a scale's grid (`firstlab.config.grid.CellsConfig`), each a grid, then `grids`."""
    if not cells:
        return dict(grids)
    try:
        typed: Any = [OmegaConf.to_object(OmegaConf.merge(CellsConfig, each)) for each in cells.values()]
        known: Any = OmegaConf.to_object(OmegaConf.merge(ScaleConfig, scale))
    except OmegaConfBaseException as error:
        raise ValueError(f"hydra.sweeper: {str(error).strip().splitlines()[0]}") from error
    runs = [run for each in typed for run in sweep_runs(known, each)]
    return {f"cell {number}": run for number, run in enumerate(runs)} | dict(grids)


def _texts(values: Any) -> list[str]:
    """A YAML value, or each of a list, in Hydra's override grammar."""
    plain = OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values
    several = plain if isinstance(plain, list) else [plain]
    return [json.dumps(each) if each is None or isinstance(each, bool) else str(each) for each in several]


def _filled(value: str, run: Mapping[str, str]) -> str:
    return re.sub(r"\{([\w.]+)\}", lambda found: run.get(found[1], found[0]), value)


@dataclass
class PlannedRun:
    """One run of a sweep: finished, failed earlier (`error` says why), interrupted or to do; `seconds` if known."""

    overrides: list[str]
    config: ExperimentConfig
    method: Method
    state: str = "to do"
    error: str | None = None
    seconds: float | None = None

    @property
    def directory(self) -> Path:
        return self.config.directory(self.method.label)


def plan(
    runs: Sequence[list[str]], compose: Callable[[list[str]], DictConfig], recorded: Path | None
) -> list[PlannedRun]:
    """Compose and check every run, find the finished ones, here or in the folder `recorded`, and time the others."""
    records = [] if recorded is None else _records(recorded)
    known = {record["config_hash"]: record for record in records}
    planned: dict[Path, PlannedRun] = {}
    broken: dict[str, list[str]] = defaultdict(list)  # what several runs would be told is said once
    shared = set(runs[0]).intersection(*runs) if len(runs) > 1 else set()
    for overrides in runs:
        name = " ".join(each for each in overrides if each not in shared) or "every run"
        try:
            run = PlannedRun(overrides, *load(compose(overrides)))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            broken[str(error).strip().splitlines()[0]].append(name)
            continue
        other = planned.setdefault(run.directory, run)
        if other.config.hash() != run.config.hash():
            whose = f"{run.directory} is also that of {' '.join(other.overrides)}"
            broken[f"its run directory {whose}; give one of them a note"].append(name)
        try:
            _look_up(other, known.get(other.config.hash()))
        except ValueError as error:
            broken[f"{error}; in a sweep overwrite=true starts every run again"].append(name)
    if broken:
        lines = [
            f"\n  {first}{f' (and {len(others)} more)' if others else ''}: {message}"
            for message, (first, *others) in broken.items()
        ]
        more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise ValueError(f"the sweep cannot start:{''.join(lines[:10])}{more}")
    for folder in {run.config.runs for run in planned.values()}:
        records += _records(Path(folder))
    _estimate(list(planned.values()), records)
    return list(planned.values())


def _records(folder: Path) -> list[Record]:
    """Records below a folder; no run depends on those that are damaged, which are named."""
    found = results.read_all(folder, lambda message: print(f"note: {message}", file=sys.stderr))
    # Without what fills memory: a plan asks which variants there are.
    return [{**each, "variants": dict.fromkeys(each["variants"])} for _, each in found if "variants" in each]


def _look_up(run: PlannedRun, recorded: Record | None = None) -> None:
    """Set the state of a run from its directory, or from a recorded result."""
    record, failure = finished_record(run.config, run.method), results.read_failure(run.directory)
    wanted = set(wanted_variants(run.config, run.method))
    if record is None and recorded is not None and not run.config.overwrite and wanted <= set(recorded["variants"]):
        record = recorded
    run.state, run.error = "to do", None
    if record is not None:
        run.state, run.seconds = "finished", record.get("wall_s")
    elif failure is not None:
        run.state, run.error = "failed earlier", failure["error"]
    elif is_trained(run.config, run.method):
        run.state = "finished"
    elif (run.directory / "config.yaml").is_file():
        run.state = "interrupted"


def _estimate(planned: list[PlannedRun], records: list[Record]) -> None:
    """Median wall time of finished runs on the same data and model: with the same method, or else with any."""
    times: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for record in records:
        # An evaluation of another run has none, a resumed run only that since then.
        if "wall_s" in record and not record.get("resumed"):
            for kind in ((record["data"], record["model"], record["method"]), (record["data"], record["model"])):
                times[kind].append(record["wall_s"])
    for run in planned:
        place = (run.config.data.name, run.config.model.name)
        measured = times.get((*place, run.method.name)) or times.get(place)
        if run.state != "finished" and measured:
            run.seconds = statistics.median(measured)


def describe(name: str, planned: list[PlannedRun]) -> str:
    """The plan as text: totals, then one line per run."""
    left = [run for run in planned if run.state != "finished"]
    known = [run.seconds for run in left if run.seconds is not None]
    time = f"about {duration(sum(known))} one after another" if known else "time unknown"
    if known and len(known) < len(left):
        time += f" for {len(known)} of them, unknown for {len(left) - len(known)}"
    states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in planned).items())
    lines = [f"{name}: {len(planned)} runs ({states}); {len(left)} to run" + (f", {time}" if left else "")]
    for run in planned:
        seconds = "unknown" if run.seconds is None else duration(run.seconds)
        lines.append(f"  {run.state:15} {seconds:>10}  {run.directory}" + (f"  ({run.error})" if run.error else ""))
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def run_sweep(
    runs: Sequence[list[str]],
    *,
    compose: Callable[[list[str]], DictConfig],
    launch: Callable[[list[list[str]]], Any],
    settings: Any,
    here: bool = True,
) -> None:
    """Print the plan, launch what is not finished, report; exits with 1 if a run has no result.

    `settings` is the `sweep` node of the configuration; jobs that run `here` need this machine's devices.
    """
    name = settings.name or "sweep"
    planned = plan(runs, compose, None if settings.recorded is None else Path(settings.recorded))
    print(describe(name, planned), flush=True)
    left = [run for run in planned if run.state != "finished"]
    if settings.plan_only:
        return
    if here:
        for run in left:
            check_device(run.config.trainer)
    lost = None
    try:
        if left:
            launch([run.overrides for run in left])
    except Exception as error:
        # A launcher raises when it loses a job (killed, out of memory): say so, go on to the report.
        lost = f"{type(error).__name__}: {str(error).strip()}"
    for run in left:
        run.config = replace(run.config, overwrite=False)
        _look_up(run)
    failed = [run for run in left if run.state != "finished"]
    if left:
        print(f"{name}: {len(planned) - len(failed)} of {len(planned)} runs finished")
    for run in failed:
        print(f"  failed: {run.directory}: {run.error or 'ended without a result and without an error of its own'}")
    if lost is not None:
        print(f"  the launcher stopped: {lost}")
    if failed:
        print("the same command tries them again; tracebacks are in failure.json of each run directory")
    if settings.collect is not None:
        collect(planned, Path(settings.collect))
    if failed:
        sys.exit(1)


def collect(planned: Sequence[PlannedRun], folder: Path) -> None:
    """Put the records of finished runs into FOLDER/records.jsonl.xz, under their run directories' names."""
    finished = {run.directory: results.read(run.directory) for run in planned if run.state == "finished"}
    found = {f"{each.parent.name}--{each.name}": record for each, record in finished.items() if record is not None}
    try:
        print(f"records: {results.add(folder, found)}")
    except ValueError as error:
        raise ValueError(f"sweep.collect={folder}: {error}") from error
