"""Find the recorded runs of each cell of the grid. No object is built from what a record names."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from firstlab.config.compose import composed_config
from firstlab.config.grid import Run, level_keys
from firstlab.store import results
from firstlab.tables.config import ScaleConfig

#: Settings that decide what a run is, beside its level; where one ran and what else was measured does not.
_SECTIONS = ("method", "router", "lora", "router_phase", "lora_phase")
_EVALUATION = ("limit", "decoder", "do_sample", "temperature", "top_k", "num_beams")
_MODEL = ("path", "dtype", "revision", "quantization")
_DATA = (
    "task", "train_size", "val_size", "test_size", "split_seed", "bucket",
    "max_length_router", "max_length_lora", "max_prompt_length", "max_new_tokens",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Record:
    """One finished run."""

    file: Path
    node: dict[str, Any]  # what it says, see `firstlab.store.results.RECORD`
    settings: dict[str, Any]  # dotted keys of the settings that decide what the run is
    # False for an evaluation on other data, or with another seed, than the run was trained with: it fills no cell.
    as_trained: bool = True

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.node["seed"])

    @property
    def level(self) -> str:
        """The level that was asked for; runs of one method and level differ in their seeds only."""
        return str(self.node.get("level", ""))

    def variant(self, name: str) -> dict[str, Any] | None:
        """Part of the record: base, base_lora, router or router_lora."""
        variant: dict[str, Any] | None = self.node["variants"].get(name)
        return variant


@dataclass
class Library:
    """All records, and what was wrong with those that are left out."""

    records: list[Record] = field(default_factory=list)  # one per configuration and seed
    benchmarks: list[dict[str, Any]] = field(default_factory=list)  # what `firstlab.benchmark` wrote
    warnings: list[str] = field(default_factory=list)  # one line per record that was left out

    def of(self, run: Run, scale: ScaleConfig) -> list[Record]:
        """Runs of the same task, model, method and settings, at any seed and, where a level is asked for, any level."""
        trained = [each for each in self.records if each.as_trained]
        near = [each for each in trained if (each.node["data"], each.node["model"]) == (run.task, run.model)]
        if not near:
            return []
        levels = set() if run.level is None else level_keys(scale)
        expected = expected_settings(tuple(each for each in run.overrides if each.partition("=")[0] not in levels))
        unused = ("router.", "router_phase.") if run.method == "none" else ()
        free = {*levels, "method.seed"}
        wanted = {key: value for key, value in expected.items() if key not in free and not key.startswith(unused)}
        return [
            record
            for record in near
            if all(record.settings.get(key, value) == value for key, value in wanted.items())
            and not any(key.startswith("data.task.") and key not in expected for key in record.settings)
        ]


def read(folders: Sequence[str]) -> Library:
    """Every result below the folders; what is damaged is left out and named in `warnings`.

    Raises ValueError if none of the folders exists.
    """
    library = Library()
    if not any(Path(folder).is_dir() for folder in folders):
        raise ValueError(f"results={list(folders)}: no such folder; name folders with result files, e.g. [experiments]")
    seen: dict[tuple[str, int], Record] = {}
    for folder in folders:
        for file, node in results.read_all(Path(folder), library.warnings.append):
            if "cells" in node:
                library.benchmarks.append(node)
                continue
            record = Record(file, node, _training(node["config"]) | _place(node["config"]), _as_trained(file, node))
            first = seen.setdefault((node["config_hash"], record.seed), record)
            if first is record:
                library.records.append(record)
            elif results.plain(first.node) != results.plain(node):
                library.warnings.append(f"{file} is left out: {first.file} holds the same run")
    return library


def _as_trained(file: Path, node: dict[str, Any]) -> bool:
    if results.EVALUATIONS not in file.parts[-3:-2]:
        return True
    try:
        run = results.read(file.parents[2])
    except ValueError:
        run = None
    return run is None or (run["data"], run["seed"]) == (node["data"], node["seed"])


def _training(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the method, of training and of evaluation."""
    unused = ("temperature", "top_k") if config["evaluation"].get("do_sample") is False else ()
    kept = [key for key in _EVALUATION if key not in unused]
    evaluation = {key: value for key, value in config["evaluation"].items() if key in kept}
    return dict(_flat({**{section: config[section] for section in _SECTIONS}, "evaluation": evaluation}))


def _place(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the model and of the data, wherever the latter's files lie."""
    model = {key: value for key, value in config["model"].items() if key in _MODEL}
    data = {key: value for key, value in config["data"].items() if key in _DATA}
    placed = {key: value for key, value in _flat({"model": model, "data": data}) if not key.endswith(".root")}
    return placed | {"init_from": config.get("init_from")}


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


@functools.cache
def expected_settings(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Settings that `python -m firstlab.train` makes of the overrides."""
    # Composing is slow: what says nothing of model and data is composed once for all of them, and the other way round.
    ours = (*_SECTIONS, "evaluation", "note")
    place = tuple(each for each in overrides if each.lstrip("+~").partition("=")[0].split(".")[0] not in ours)
    rest = tuple(each for each in overrides if not each.startswith(("data=", "data.", "model=", "model.")))
    said = _composed(rest)
    # What the file of a method leaves out is the class's default; the target is the command line's own.
    unsaid = {each.name: each.default for each in fields(get_object(said["method"]["_target_"]))}
    method = {key: value for key, value in (unsaid | said["method"]).items() if value is not MISSING}
    return _training({**said, "method": method}) | _place(_composed(place))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return composed_config(overrides)
