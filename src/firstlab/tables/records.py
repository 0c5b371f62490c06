"""Find the recorded runs of each cell of the grid. No object is built from what a record names."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.utils import get_object

from firstlab.config.compose import composed_config
from firstlab.config.grid import Run, ScaleConfig, level_keys
from firstlab.store import results

#: Settings that decide what a run is, by section; all of it where none is named. Where it ran does not decide.
_SETTINGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("method", "router", "lora", "router_phase", "lora_phase"), ()),
    "evaluation": ("limit", "decoder", "do_sample", "temperature", "top_k", "num_beams"),
    "model": ("path", "dtype", "revision", "quantization"),
    "data": (
        "task", "train_size", "val_size", "test_size", "split_seed", "bucket",
        "max_length_router", "max_length_lora", "max_prompt_length", "max_new_tokens",
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Record:
    """One finished run."""

    file: Path
    node: dict[str, Any]  # what it says, see `firstlab.store.results.RECORD`
    seed: int
    level: str  # that was asked for; runs of one method and level differ in their seeds only
    settings: dict[str, Any]  # by dotted key, those of `_SETTINGS`
    as_trained: bool  # False for an evaluation on other data, or with another seed, than in training: it fills no cell

    def examples(self, variant: str) -> dict[str, Any]:
        """Numbers per test prompt, as they are packed; older records lack some, or all."""
        found: dict[str, Any] = self.node["variants"].get(variant, {}).get("examples", {})
        return found


@dataclass
class Library:
    """All records, and what was wrong with those that are left out."""

    records: list[Record] = field(default_factory=list)  # one per configuration and seed
    benchmarks: list[dict[str, Any]] = field(default_factory=list)  # what `firstlab.benchmark` wrote
    harness: list[dict[str, Any]] = field(default_factory=list)  # what lm-evaluation-harness wrote
    warnings: list[str] = field(default_factory=list)  # one line per record that was left out

    def of(self, run: Run, scale: ScaleConfig) -> list[Record]:
        """Runs of the same task, model, method and settings, at any seed and, where a level is asked for, any level."""
        asked = run.task, run.model
        near = [each for each in self.records if each.as_trained and (each.node["data"], each.node["model"]) == asked]
        if not near:
            return []
        levels = set() if run.level is None else level_keys(scale)
        expected = expected_settings(tuple(each for each in run.overrides if each.partition("=")[0] not in levels))
        unused = ("method.seed", *(("router.", "router_phase.") if run.method == "none" else ()))
        wanted = {key: value for key, value in expected.items() if key not in levels and not key.startswith(unused)}
        return [
            record
            for record in near
            if all(record.settings.get(key, value) == value for key, value in wanted.items())
            and not any(key.startswith("data.task.") and key not in expected for key in record.settings)
        ]


def read(folders: Sequence[str]) -> Library:
    """Every result below the folders; what is damaged is left out and named in `warnings`."""
    library = Library()
    if not any(Path(folder).is_dir() for folder in folders):
        raise ValueError(f"results={list(folders)}: no such folder; name folders with result files, e.g. [experiments]")
    seen: dict[tuple[str, int], Record] = {}
    for folder in folders:
        for file, node in results.read_all(Path(folder), library.warnings.append):
            if "cells" in node:
                library.benchmarks.append(node)
                continue
            if "results" in node:
                library.harness.append(node)
                continue
            made = _settings(node["config"]), _as_trained(file, node)
            record = Record(file, node, node["seed"], node.get("level", ""), *made)
            first = seen.setdefault((node["config_hash"], record.seed), record)
            if first is record:
                library.records.append(record)
            elif results.plain(first.node) != results.plain(node):
                library.warnings.append(f"{file} is left out: {first.file} holds the same run")
    return library


def _as_trained(file: Path, node: dict[str, Any]) -> bool:
    run = None
    if results.EVALUATIONS in file.parts[-3:-2]:
        with suppress(ValueError):  # a damaged record has its own warning
            run = results.read(file.parents[2])
    return run is None or (run["data"], run["seed"]) == (node["data"], node["seed"])


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    greedy = config["evaluation"].get("do_sample") is False
    unused = (".root", *(("evaluation.temperature", "evaluation.top_k") if greedy else ()))
    found = {"init_from": config.get("init_from")}
    for section, names in _SETTINGS.items():
        chosen = {key: value for key, value in config[section].items() if not names or key in names}
        found |= {key: value for key, value in _flat(chosen, section) if not key.endswith(unused)}
    return found


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
    ours = {*_SETTINGS, "note"} - {"model", "data"}
    place = tuple(each for each in overrides if each.lstrip("+~").partition("=")[0].split(".")[0] not in ours)
    rest = tuple(each for each in overrides if not each.startswith(("data=", "data.", "model=", "model.")))
    said, placed = _composed(rest), _composed(place)
    # What the file of a method leaves out is the class's default; the target is the command line's own.
    unsaid = {each.name: each.default for each in fields(get_object(said["method"]["_target_"]))}
    method = {key: value for key, value in (unsaid | said["method"]).items() if value is not MISSING}
    return _settings({**said, "method": method, **{key: placed.get(key) for key in ("model", "data", "init_from")}})


_composed = functools.cache(composed_config)
