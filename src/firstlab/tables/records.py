"""Result files, and which of them belongs to which cell of the grid."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from firstlab import results
from firstlab.config import UNSAID, conf_dir, register
from firstlab.tables.config import ScaleConfig
from firstlab.tables.grid import Run, level_keys

#: Settings that decide what a run is, beside its level; where one ran and what else was measured does not.
_SECTIONS = ("method", "router", "lora", "router_phase", "lora_phase")
_EVALUATION = ("limit", "decoder", "do_sample", "temperature", "top_k", "num_beams")


@dataclass(frozen=True, eq=False)
class Record:
    """One finished run.

    Attributes:
        file: Where it was read.
        node: What the file says.
        settings: Dotted keys of the settings that decide what the run is.
    """

    file: Path
    node: dict[str, Any]
    settings: dict[str, Any]

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
    """All records, and what was wrong with those that are left out.

    Attributes:
        records: One per configuration and seed.
        benchmarks: What `firstlab.benchmark` wrote (benchmark.json).
        warnings: One line per file that was left out.
    """

    records: list[Record] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def of(self, run: Run, scale: ScaleConfig) -> list[Record]:
        """Runs of the same task, model, method and settings, at any seed and, where a level is asked for, any level."""
        near = [each for each in self.records if (each.node["data"], each.node["model"]) == (run.task, run.model)]
        if not near:
            return []
        levels = set() if run.level is None else level_keys(scale)
        expected = _expected(tuple(each for each in run.overrides if each.partition("=")[0] not in levels))
        unused = ("router.", "router_phase.") if run.method == "none" else ()
        wanted = {
            key: value
            for key, value in expected.items()
            if key not in levels and key != "method.seed" and not key.startswith(unused)
        }
        # Settings that one of both does not know are newer or older than the other.
        return [
            record
            for record in near
            if all(record.settings[key] == value for key, value in wanted.items() if key in record.settings)
        ]


def read(folders: Sequence[str]) -> Library:
    """Every result below the folders.

    A file that is torn, or is no result, is left out and named in `warnings`: one bad file among hundreds must not
    keep the others from being seen.

    Raises:
        ValueError: None of the folders exists.
    """
    library = Library()
    missing = [folder for folder in folders if not Path(folder).is_dir()]
    if len(missing) == len(folders):
        raise ValueError(f"results={list(folders)}: no such folder; name folders with result files, e.g. [experiments]")
    seen: dict[tuple[str, int], Path] = {}
    for folder in folders:
        for file in _result_files(Path(folder)):
            try:
                record = _record(file)
            except ValueError as error:
                library.warnings.append(f"{file} is left out: {error}")
                continue
            key = record.node["config_hash"], record.seed
            if key in seen:
                if seen[key].read_bytes() != file.read_bytes():
                    library.warnings.append(f"{file} is left out: {seen[key]} holds the same run")
                continue
            seen[key] = file
            library.records.append(record)
        for file in sorted(Path(folder).rglob("benchmark.json")):
            try:
                library.benchmarks.append(_node(file, ("model", "device", "cells")))
            except ValueError as error:
                library.warnings.append(f"{file} is left out: {error}")
    return library


def _result_files(folder: Path) -> Iterator[Path]:
    """Sorted, so that tables do not depend on the file system."""
    if folder.is_dir():
        yield from sorted({*folder.rglob("results/*.json"), *folder.rglob(results.RESULT)})


def _node(file: Path, needed: Sequence[str]) -> dict[str, Any]:
    try:
        node = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({error})") from error
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    absent = [key for key in needed if not isinstance(node, dict) or key not in node]
    if absent:
        raise ValueError(f"not a result of firstlab (it has no {', '.join(absent)})")
    return node


def _record(file: Path) -> Record:
    node = _node(file, ("method", "model", "data", "seed", "config", "config_hash", "variants", "num_layers"))
    for name, variant in node["variants"].items():
        for key in ("metrics", "skip", "n"):
            if key not in variant:
                raise ValueError(f"its variant {name} has no {key}")
    return Record(file, node, _settings(node["config"]))


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {section: config.get(section, {}) for section in _SECTIONS}
    chosen["method"] = UNSAID | chosen["method"]
    evaluation = {key: value for key, value in config.get("evaluation", {}).items() if key in _EVALUATION}
    evaluation = {"decoder": "generate"} | evaluation  # as recorded before there was a choice
    if evaluation.get("do_sample") is False:
        evaluation = {key: value for key, value in evaluation.items() if key not in ("temperature", "top_k")}
    chosen["evaluation"] = evaluation
    chosen["data"] = {"train_size": config.get("data", {}).get("train_size")}
    return dict(_flat(chosen, ""))


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


@functools.cache
def _expected(overrides: tuple[str, ...]) -> dict[str, Any]:
    """Settings that `python -m firstlab.train` makes of the overrides."""
    # The task decides nothing here but the number of training prompts, and composing is slow: one task serves all.
    named = dict(each.split("=", 1) for each in overrides)
    settings = dict(_composed(tuple(each for each in overrides if not each.startswith(("data=", "model=")))))
    if "data.train_size" not in named:
        task = Path(conf_dir()) / "data" / f"{named['data']}.yaml"
        settings["data.train_size"] = yaml.safe_load(task.read_text(encoding="utf-8")).get("train_size")
    return settings


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return _settings(composed_config(overrides))


def composed_config(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration that `python -m firstlab.train OVERRIDES` would run, unchecked; nothing is built."""
    register()
    GlobalHydra.instance().clear()  # the entry point's own, which is done composing
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        node = OmegaConf.to_container(compose("train", list(overrides)), resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}
