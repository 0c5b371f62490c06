"""Result files, and which of them belongs to which cell of the grid."""

from __future__ import annotations

import functools
import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firstlab.config.compose import composed_config
from firstlab.store import results
from firstlab.tables.config import ScaleConfig
from firstlab.tables.grid import Run, level_keys

#: Settings that decide what a run is, beside its level; where one ran and what else was measured does not.
_SECTIONS = ("method", "router", "lora", "router_phase", "lora_phase")
_EVALUATION = ("limit", "decoder", "do_sample", "temperature", "top_k", "num_beams")
_MODEL = ("path", "dtype", "revision", "quantization")
_DATA = (
    "task", "train_size", "val_size", "test_size", "split_seed", "bucket",
    "max_length_router", "max_length_lora", "max_prompt_length", "max_new_tokens",
)  # fmt: skip
#: Numbers per test prompt, beside its scores.
_COLUMNS = ("difficulty", "prompt_tokens", "response_tokens", "skip_rate", "nll")
#: Where `firstlab.evaluate` writes, inside a run directory.
_EVALUATIONS = "evaluations"
# Settings that older records lack, with what those runs did.
_UNSAID = {"skip_prefill": False, "search_width": 1}


@dataclass(frozen=True, eq=False)
class Record:
    """One finished run.

    Attributes:
        file: Where it was read.
        node: What the file says.
        settings: Dotted keys of the settings that decide what the run is.
        as_trained: False for an evaluation on other data, or with another seed, than the run was trained with: it is
            listed and stands for no cell.
    """

    file: Path
    node: dict[str, Any]
    settings: dict[str, Any]
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
        near = [
            each
            for each in self.records
            if each.as_trained and (each.node["data"], each.node["model"]) == (run.task, run.model)
        ]
        if not near:
            return []
        levels = set() if run.level is None else level_keys(scale)
        expected = expected_settings(tuple(each for each in run.overrides if each.partition("=")[0] not in levels))
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
            and not any(key.startswith("data.task.") and key not in expected for key in record.settings)
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
                library.benchmarks.append(_benchmark(file))
            except ValueError as error:
                library.warnings.append(f"{file} is left out: {error}")
    return library


def _result_files(folder: Path) -> Iterator[Path]:
    """Sorted, so that tables do not depend on the file system; a run's own result before later evaluations of it."""
    if folder.is_dir():
        files = {*folder.rglob("results/*.json"), *folder.rglob(results.RESULT)}
        yield from sorted(files, key=lambda file: (_EVALUATIONS in file.relative_to(folder).parts, file))


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
    for key in ("method", "model", "data", "config_hash"):
        _take(node, key, str)
    _take(node, "seed", int)
    config, layers = _take(node, "config", dict), _take(node, "num_layers", int)
    if layers < 1:
        raise ValueError(f"it has num_layers={layers}")
    for section in (*_SECTIONS, "evaluation", "model", "data"):
        if section in config:
            _take(config, section, dict, "its config")
    for name in _take(node, "variants", dict):
        _check_variant(_take(node["variants"], name, dict, "its variants"), f"its variant {name}", layers)
    return Record(file, node, _training(config) | _place(config), _as_trained(file, node))


def _as_trained(file: Path, node: dict[str, Any]) -> bool:
    if _EVALUATIONS not in file.parts[-3:-2]:
        return True
    try:
        run = _node(file.parents[2] / results.RESULT, ("data", "seed"))
    except ValueError:
        return True  # nothing is known of the run
    return bool((run["data"], run["seed"]) == (node["data"], node["seed"]))


def _check_variant(part: dict[str, Any], where: str, layers: int) -> None:
    """Raises ValueError where tables could not read it; metrics that came out as NaN (null) are taken out."""
    count, skip, metrics = (
        _take(part, key, kind, where) for key, kind in (("n", int), ("skip", dict), ("metrics", dict))
    )
    _take(skip, "skip_rate", float, f"{where}: skip")
    if len(_numbers(skip, "per_layer", f"{where}: skip")) != layers:
        raise ValueError(f"{where}: skip: per_layer has {len(skip['per_layer'])} numbers for {layers} layers")
    for key in ("unique_routes", "route_entropy_bits", "mode_agreement", "static_agreement"):
        _take(skip, key, float, f"{where}: skip", optional=True)
    for level, group in (_take(skip, "by_difficulty", dict, f"{where}: skip", optional=True) or {}).items():
        if not isinstance(group, dict) or not level.replace(".", "", 1).isdecimal():
            raise ValueError(f"{where}: skip: by_difficulty has {reprlib.repr(level)}: {reprlib.repr(group)}")
        _take(group, "n", int, f"{where}: skip: by_difficulty")
        _take(group, "skip_rate", float, f"{where}: skip: by_difficulty")

    primary = _take(part, "primary_metric", str, where, optional=True)
    if primary is not None and primary not in metrics:
        raise ValueError(f"{where} has no metric {primary}, its primary_metric")
    for name in list(metrics):
        metric = _take(metrics, name, dict, f"{where}: metrics")
        if None in [metric.get(key, ...) for key in ("value", "low", "high")]:
            del metrics[name]
            continue
        for key in ("value", "low", "high"):
            _take(metric, key, float, f"{where}: {name}")
    if not metrics:
        raise ValueError(f"{where} has no metric with a value")
    if primary not in metrics:
        part.pop("primary_metric", None)

    _take(part, "perplexity", float, where, optional=True)
    timing = _take(part, "timing", dict, where, optional=True) or {}
    _take(timing, "tpot_ratio", float, f"{where}: timing", optional=True)
    quartiles = "tpot_ratio_quartiles"
    if timing.get(quartiles) is not None and len(_numbers(timing, quartiles, f"{where}: timing")) != 2:
        raise ValueError(f"{where}: timing: {quartiles} has {len(timing[quartiles])} numbers, not two")
    _check_examples(_take(part, "examples", dict, where, optional=True) or {}, f"{where}: examples", count)


def _check_examples(examples: dict[str, Any], where: str, count: int) -> None:
    """Raises ValueError where per-prompt numbers cannot be read, or are not one per prompt."""
    _take(examples, "test_set", str, where, optional=True)
    scores = _take(examples, "scores", dict, where, optional=True) or {}
    for node, keys, dimensions in ((examples, _COLUMNS, 1), (scores, list(scores), 2)):
        for key in keys:
            packed = _take(node, key, str, where, optional=True)
            try:
                numbers = None if packed is None else results.unpack(packed)
            except ValueError as error:
                raise ValueError(f"{where}: {key}: {error}") from error
            # Scores of a part of a mixture (PART/NAME) are those of its own prompts.
            length = count if numbers is None or "/" in key else len(numbers)
            if numbers is not None and (numbers.ndim, length) != (dimensions, count):
                raise ValueError(f"{where}: {key} holds numbers of the shape {numbers.shape} for {count} prompts")


def _benchmark(file: Path) -> dict[str, Any]:
    node = _node(file, ("model", "device", "cells"))
    for key in ("model", "device"):
        _take(node, key, str)
    for cell in _take(node, "cells", list):
        if not isinstance(cell, dict):
            raise ValueError(f"its cells hold {reprlib.repr(cell)}, not a mapping")
        _take(cell, "router_share_of_prefill", float, "its cell")
    return node


_KINDS = {str: "text", dict: "a mapping", list: "a list", int: "a whole number", float: "a number"}


def _take(node: dict[str, Any], key: str, kind: type, where: str = "it", optional: bool = False) -> Any:
    """What stands at a key, which must be of that kind; where it is optional, null stands for nothing and goes.

    Raises:
        ValueError: It is absent or of another kind.
    """
    value: Any = node.get(key)
    if value is None and optional:
        node.pop(key, None)
        return None
    if key not in node:
        raise ValueError(f"{where} has no {key}")
    fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if not fits or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where} has {key}={reprlib.repr(value)}, not {_KINDS[kind]}")
    return value


def _numbers(node: dict[str, Any], key: str, where: str) -> list[float]:
    values: list[float] = _take(node, key, list, where)
    for value in values:
        _take({key: value}, key, float, where)
    return values


def _training(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the method, of training and of evaluation."""
    chosen: dict[str, Any] = {section: config.get(section, {}) for section in _SECTIONS}
    chosen["method"] = _UNSAID | chosen["method"]
    evaluation = {key: value for key, value in config.get("evaluation", {}).items() if key in _EVALUATION}
    evaluation = {"decoder": "generate"} | evaluation  # as recorded before there was a choice
    if evaluation.get("do_sample") is False:
        evaluation = {key: value for key, value in evaluation.items() if key not in ("temperature", "top_k")}
    chosen["evaluation"] = evaluation
    return dict(_flat(chosen, ""))


def _place(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the model and of the data, wherever the latter's files lie."""
    model = {"quantization": None} | {key: value for key, value in config.get("model", {}).items() if key in _MODEL}
    data = {key: value for key, value in config.get("data", {}).items() if key in _DATA}
    flat = _flat({"model": model, "data": data}, "")
    placed = {key: value for key, value in flat if not key.endswith(".root")}
    return placed | {"init_from": config.get("init_from")}


def _flat(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
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
    return _training(_composed(rest)) | _place(_composed(place))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return composed_config(overrides)
