"""The record of a run: its schema, its one writer and its one reader.

Folders hold records as result.json of a run directory, as results/*.json, and many together in records.jsonl.xz.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import lzma
import math
import reprlib
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from firstlab.store.files import claimed, json_text, write_atomically

RESULT = "result.json"
FAILURE = "failure.json"
BENCHMARK = "benchmark.json"
PACKED = "records.jsonl.xz"
SUMMARY = "summary.csv"
#: As lm-evaluation-harness calls its files.
HARNESS = "results_*.json"
#: Where `firstlab.evaluate` writes, inside a run directory.
EVALUATIONS = "evaluations"
#: Environment variable that tells the processes of a run that it is a job of a sweep, which wants to know failures.
SWEEP_JOB = "FIRSTLAB_SWEEP_JOB"
ROW_NAMES = {"base": "Base", "base_lora": "Base + LoRA", "router": "Router", "router_lora": "Router + LoRA"}

#: Numbers per test prompt: an array as `pack` writes it, or a plain list as records.jsonl.xz holds it.
Numbers = str | list[Any]
_NUMBERS = (str, list)

# Schemas: key -> type, [type] for a list of it, {"*": type} for a mapping to it, or a schema. A key that ends in "?"
# may be missing or null; keys that no schema names are left alone.
_METRIC = {"value?": float, "low?": float, "high?": float}  # 0 to 100; null where it came out as NaN
_EXAMPLES = {  # [n] numbers per test prompt, [n, k] per metric in `scores`; test_set is a hash of the prompts
    "test_set?": str,
    **dict.fromkeys(("difficulty?", "prompt_tokens?", "response_tokens?", "skip_rate?", "nll?"), _NUMBERS),
    "scores?": {"*": _NUMBERS},
}
_VARIANT = {
    "n": int,
    "skip": {
        "skip_rate": float,
        "per_layer": [float],
        "skip_rate_by_token?": float,
        "by_difficulty?": {"*": {"n": int, "skip_rate": float}},
        "by_part?": {"*": {"n": int, "skip_rate": float, "skip_rate_by_token?": float, "perplexity?": float}},
        **dict.fromkeys(("unique_routes?", "route_entropy_bits?", "mode_agreement?", "static_agreement?"), float),
    },
    "metrics": {"*": _METRIC},
    "primary_metric": str,
    "perplexity?": float,
    "timing?": {"tpot_ratio?": float, "tpot_ratio_quartiles?": [float]},
    "examples?": _EXAMPLES,
}
_VARIANT["rates?"] = {"*": dict(_VARIANT)}  # the same model at other rates, by the rate that was asked for
#: `ExperimentConfig.identity()` of the run: data to compare with, never to build objects from.
_SECTIONS = ("model", "data", "method", "router", "lora", "router_phase", "lora_phase", "evaluation")
#: A finished run; beside these keys it says which code, packages and machine it ran on.
RECORD = {
    **dict.fromkeys(("method", "label", "model", "data", "directory", "config_hash"), str),
    "config": dict.fromkeys(_SECTIONS, dict),
    "seed": int,
    "num_layers": int,
    "variants": {"*": _VARIANT},
    "level?": str,
    "note?": str,
    "wall_s?": float,
    "resumed?": bool,
    "phases?": dict,
}
#: What tables read of lm-evaluation-harness's own files: values of each task, by "METRIC,FILTER", and of whose model.
HARNESS_RECORD = {
    "results": {"*": dict},
    "model_name?": str,
    "config": {
        "firstlab?": {  # not of other models
            "skip_rate": float,
            "skip_rate_asked?": float,
            **dict.fromkeys(("model?", "data?", "method?", "level?", "variant?"), str),
            "seed?": int,
        }
    },
}
#: What tables read of benchmark.json: one cell per batch size and prompt length.
BENCHMARK_RECORD = {"model": str, "device": str, "cells": [{"router_share_of_prefill": float}]}


def write(directory: Path, record: Mapping[str, Any]) -> None:
    """Write result.json, last and atomically; what is not finite is null there."""
    write_atomically(directory / RESULT, json_text(record, indent=2) + "\n")


def read(directory: Path, remedy: str = "pass overwrite=true to run again") -> dict[str, Any] | None:
    """The record of a finished run, or None if it has none; ValueError, with the remedy, if it is damaged."""
    file = directory / RESULT
    if not file.is_file():
        return None
    try:
        return checked(_json(file.read_text(encoding="utf-8")), RECORD)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no result of firstlab: {error}; {remedy}") from error


def read_all(folder: Path, warn: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every kind of record below a folder, with where it stands; what is damaged is warned of and left out."""
    patterns = (RESULT, "results/*.json", BENCHMARK, HARNESS, PACKED)
    files = {file for pattern in patterns for file in folder.rglob(pattern)}
    # A run's own result comes before later evaluations of it.
    for file in sorted(files, key=lambda each: (EVALUATIONS in each.relative_to(folder).parts, each)):
        yield from _read_file(file, warn)


def _read_file(file: Path, warn: Callable[[str], None]) -> Iterator[tuple[Path, dict[str, Any]]]:
    packed = file.name == PACKED
    try:
        with (lzma.open if packed else open)(file, "rt", encoding="utf-8") as opened:
            for number, text in enumerate(opened if packed else [opened.read()], 1):
                place = file / f"line {number}" if packed else file
                try:
                    node = _json(text)
                    if packed:
                        _check(node, {"name": str}, "")
                        place = file / node.pop("name")
                    found = checked(node, _schema(file, node))
                except ValueError as error:
                    warn(f"{place} is left out: {error}")
                else:
                    yield place, found
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        warn(f"{file}{' or its rest' if packed else ''} is left out: {error}")


def _schema(file: Path, node: Any) -> dict[str, Any]:
    """What a record must look like, by its file's name or, where several kinds are packed, by what it has."""
    packed = file.name == PACKED
    if "cells" in node if packed else file.name == BENCHMARK:
        return BENCHMARK_RECORD
    return HARNESS_RECORD if ("results" in node if packed else file.match(HARNESS)) else RECORD


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON ({error})") from error


def add(folder: Path, records: Mapping[str, Mapping[str, Any]]) -> Path:
    """Put records under their names into FOLDER/records.jsonl.xz and write summary.csv; returns the former."""

    def refuse(message: str) -> None:
        raise ValueError(f"{message}; repair or delete the file, or choose another folder")

    file = folder / PACKED
    with claimed(folder):
        kept = {place.name: node for place, node in _read_file(file, refuse)} if file.is_file() else {}
        for name, record in records.items():
            if name in kept and kept[name].get("config_hash") != record.get("config_hash"):
                raise ValueError(f"{file}: {name} records another configuration; choose another folder")
            kept[name] = plain(record)
        rows = [{"name": name, **kept[name]} for name in sorted(kept)]
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n" for row in rows]
        write_atomically(file, lzma.compress("".join(lines).encode()))
        write_atomically(folder / SUMMARY, _summary(rows))
    return file


def _summary(rows: list[dict[str, Any]]) -> str:
    """CSV with one line per variant of each run, decoder of each benchmark and task of the harness."""

    def lines(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        return _timings(row) if "cells" in row else _tasks(row) if "results" in row else _qualities(row)

    found = [line for row in rows for line in lines(row)]
    text = io.StringIO()
    out = csv.DictWriter(text, list(dict.fromkeys(key for line in found for key in line)), lineterminator="\n")
    out.writeheader()
    out.writerows({key: f"{x:.5g}" if isinstance(x, float) else x for key, x in line.items()} for line in found)
    return text.getvalue()


def _qualities(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    run = {key: row.get(key) for key in ("name", "model", "data", "method", "level", "seed")}
    for name, variant in row["variants"].items():
        asked = [(f"asked {100 * float(rate):g} %", part) for rate, part in variant.get("rates", {}).items()]
        for level, part in [(row.get("level"), variant), *asked]:
            metric, skip = part["primary_metric"], part["skip"]
            rates = {"skip_rate": skip["skip_rate"], "skip_rate_by_token": skip.get("skip_rate_by_token")}
            value = {"metric": metric} | {key: part["metrics"][metric][key] for key in ("value", "low", "high")}
            times = {"perplexity": part.get("perplexity"), "tpot_ratio": part.get("timing", {}).get("tpot_ratio")}
            yield run | {"level": level, "variant": name} | rates | value | times


def _tasks(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    model = row["config"].get("firstlab", {})
    run = {"name": row["name"]} | {key: model.get(key) for key in ("model", "data", "method", "level", "seed")}
    for task, values in row["results"].items():
        for metric, value, low, high in harness_scores(values):
            place = {"variant": model.get("variant"), "skip_rate": model.get("skip_rate"), "metric": f"{task} {metric}"}
            yield run | place | {"value": value, "low": low, "high": high}


def harness_scores(values: Mapping[str, Any]) -> Iterator[tuple[str, float, float | None, float | None]]:
    """Metric, value and 95 % interval, of what the harness says of one task.

    Shares have Wilson's interval, which does not shrink to a point at 0 and 1; all else, 1.96 of the standard errors.
    """
    for key, value in values.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error, count = values.get(f"{metric}_stderr,{rule}"), values.get("sample_len")
        if metric.startswith(("acc", "exact_match")) and isinstance(count, int) and count > 0 and 0 <= value <= 1:
            z2 = 1.96**2 / count
            middle = (value + z2 / 2) / (1 + z2)
            half = math.sqrt(z2 * value * (1 - value) + z2**2 / 4) / (1 + z2)
            yield metric, value, middle - half, middle + half
        elif isinstance(error, int | float):
            yield metric, value, value - 1.96 * error, value + 1.96 * error
        else:
            yield metric, value, None, None


def _timings(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    run = {key: row[key] for key in ("name", "model", "device")}
    keys = ["decoder", "quantization", "skip_rate", "ttft_s", "tpot_mean_s"]
    keys += ["tpot_ratio", "limit_ratio", "tokens_per_s"]
    for cell in row["cells"]:
        place = {key: cell.get(key) for key in ("batch_size", "prompt_length")}
        for variant in cell.get("variants", []):
            yield run | place | {key: variant.get(key) for key in keys}


def checked(node: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """The node without optional keys that are null; ValueError if it does not follow the schema."""
    _check(node, schema, "")
    if schema is RECORD:
        for name, variant in node["variants"].items():
            _check_variant(variant, f"variants.{name}", node["num_layers"])
            for rate, part in variant.get("rates", {}).items():
                if not rate.replace(".", "", 1).isdecimal():
                    raise ValueError(f"variants.{name}.rates has a rate that is no number")
                _check_variant(part, f"variants.{name}.rates.{rate}", node["num_layers"])
        for name, phase in node.get("phases", {}).items():
            _check(phase or {}, dict, f"phases.{name}")  # null where a run has not trained it
    return dict(node)


def _check_variant(variant: dict[str, Any], where: str, layers: int) -> None:
    """Raises ValueError where numbers of a variant do not fit together."""
    metrics, primary, whole = variant["metrics"], variant["primary_metric"], {"value", "low", "high"}
    if primary not in metrics:
        raise ValueError(f"{where} has no metric {primary}, its primary_metric")
    variant["metrics"] = kept = {name: each for name, each in metrics.items() if whole <= each.keys()}
    if not kept:
        raise ValueError(f"{where} has no metric with a value")
    if primary not in kept:
        variant["primary_metric"] = next(iter(kept))
    quartiles = variant.get("timing", {}).get("tpot_ratio_quartiles", [0, 0])
    per_layer = variant["skip"]["per_layer"]
    for key, values, length in (("skip.per_layer", per_layer, layers), ("timing.tpot_ratio_quartiles", quartiles, 2)):
        if len(values) != length:
            raise ValueError(f"{where}.{key} has {len(values)} numbers, not {length}")
    if any(not level.replace(".", "", 1).isdecimal() for level in variant["skip"].get("by_difficulty", {})):
        raise ValueError(f"{where}.skip.by_difficulty has a level that is no number")
    examples = variant.get("examples", {})
    columns = {key: (value, 1) for key, value in examples.items() if key not in ("test_set", "scores")}
    columns |= {f"scores.{key}": (value, 2) for key, value in examples.get("scores", {}).items()}
    for key, (packed, dimensions) in columns.items():
        try:
            numbers = unpack(packed)
        except ValueError as error:
            raise ValueError(f"{where}.examples.{key}: {error}") from error
        # Scores of a part of a mixture (PART/NAME) are those of its own prompts.
        count = len(numbers) if "/" in key and numbers.ndim else variant["n"]
        if numbers.shape[:1] != (count,) or numbers.ndim != dimensions:
            raise ValueError(f"{where}.examples.{key} has numbers of the shape {numbers.shape} for {count} prompts")


_NAMES = {str: "text", dict: "a mapping", list: "a list", _NUMBERS: "a list"}
_NAMES |= {int: "a whole number", float: "a number", bool: "true or false"}


def _check(value: Any, kind: Any, where: str) -> None:
    """Raises ValueError if a value does not follow a schema."""
    plain_kind = type(kind) if isinstance(kind, dict | list) else kind
    fits = isinstance(value, int | float if kind is float else plain_kind) and isinstance(value, bool) == (kind is bool)
    if not fits or (kind is float and not abs(value) <= sys.float_info.max):
        found = f"{where}={reprlib.repr(value)}" if where else reprlib.repr(value)
        raise ValueError(f"{found} is not {_NAMES[plain_kind]}")
    if isinstance(kind, list):
        for each in value:
            _check(each, kind[0], where)
    elif isinstance(kind, dict) and "*" in kind:
        for key, each in value.items():
            _check(each, kind["*"], f"{where}.{key}")
    elif isinstance(kind, dict):
        for name, each in kind.items():
            key = name.rstrip("?")
            if value.get(key) is not None:
                _check(value[key], each, f"{where}.{key}".lstrip("."))
            elif key == name:
                raise ValueError(f"{where or 'it'} has no {key}")
            else:
                value.pop(key, None)


def write_failure(directory: Path, error: BaseException) -> None:
    """Record why a run of a sweep ended without a result; `read_failure` reads it, the next try deletes it."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    record = {
        "error": kind + (str(error).strip() or "no message").splitlines()[0],
        "traceback": "".join(traceback.format_exception(error)),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_atomically(directory / FAILURE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_failure(directory: Path) -> dict[str, Any] | None:
    """What `write_failure` recorded, or None; a file that cannot be read counts as a failure, too."""
    file = directory / FAILURE
    if not file.is_file():
        return None
    try:
        failure: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        _check(failure, {"error": str}, "")
    except (OSError, ValueError):
        return {"error": f"{file} cannot be read"}
    return failure


def pack(values: Any) -> str:
    """An array as short text: NumPy's own format, compressed, in base64; int32 where whole, else float32."""
    array = np.asarray(values)
    whole = np.issubdtype(array.dtype, np.integer) or bool(np.all(array == np.floor(array)))
    buffer = io.BytesIO()
    np.save(buffer, array.astype(np.int32 if whole else np.float32), allow_pickle=False)
    return base64.b64encode(zlib.compress(buffer.getvalue(), 9)).decode("ascii")


def unpack(numbers: Numbers) -> np.ndarray:
    """What `pack` was given, as float64; ValueError if it is something else."""
    try:
        array = np.asarray(numbers) if isinstance(numbers, list) else _array(numbers)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"not numbers but {reprlib.repr(numbers)}")
    except (zlib.error, TypeError, ValueError, EOFError) as error:
        raise ValueError(f"per-example numbers cannot be read: {error}") from error
    return (array.astype(np.float32) if array.dtype.kind == "f" else array).astype(np.float64)


def _array(packed: str) -> np.ndarray:
    raw = zlib.decompress(base64.b64decode(packed, validate=True))
    return np.asarray(np.load(io.BytesIO(raw), allow_pickle=False))


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with every packed array as a list, which compresses better beside other records."""

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: each if key == "test_set" else listed(each) for key, each in value.items()}
        if not isinstance(value, str):
            return value
        array = _array(value)
        if not np.isfinite(array).all():
            return value  # JSON has no such numbers
        # The shortest decimals that give the same float32.
        return np.asarray(array.astype(str), dtype=np.float64).tolist() if array.dtype.kind == "f" else array.tolist()

    def opened(variant: Mapping[str, Any]) -> dict[str, Any]:
        found = {"examples": listed(variant["examples"])} if variant.get("examples") else {}
        rates = {rate: opened(part) for rate, part in variant.get("rates", {}).items()}
        return {**variant, **found, **({"rates": rates} if rates else {})}

    variants = {name: opened(variant) for name, variant in record.get("variants", {}).items()}
    return {**record, **({"variants": variants} if variants else {})}


def rate_by_token(rates: np.ndarray, response_tokens: np.ndarray) -> float:
    """Skip rate over the decode steps of all references [N], which are equally long for every method."""
    steps = np.maximum(response_tokens - 1, 0)  # prefill gives the first token
    return float((rates * steps).sum() / steps.sum()) if steps.any() else float(rates.mean())
