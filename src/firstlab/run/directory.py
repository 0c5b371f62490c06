"""Inspect a run directory (whose run it is, what is done, what remains to do) and take it over for a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from firstlab.config.compose import load_dict, read_saved
from firstlab.config.schema import PHASES, ExperimentConfig
from firstlab.methods.base import Method
from firstlab.store import results
from firstlab.store.files import read_own, remove_torn, write_atomically, yaml_text
from firstlab.store.ranks import barrier, rank

CONFIG = "config.yaml"


def variant_names(method: Method) -> tuple[str, str]:
    """The variants of a method before and after LoRA."""
    return ("base", "base_lora") if method.name == "none" else ("router", "router_lora")


def phase_record(directory: Path, phase: str) -> dict[str, Any] | None:
    """What NAME.yaml says about a phase, None if this run has not trained it; ValueError if the file is damaged."""

    def parse(saved: Any) -> dict[str, Any]:
        if not all(isinstance(saved[key], int | float) for key in ("steps", "multiplier", "seconds")):
            raise ValueError("it holds no record of a phase")
        return dict(saved)

    file, product = directory / f"{phase}.yaml", directory / phase
    if not file.is_file() and not product.is_dir():
        return None
    remedy = f"delete it and {product}, and result.json if there is one, and give the training command again"
    return read_own(file, parse, f"{remedy} to train this phase")


def wanted_variants(config: ExperimentConfig, method: Method) -> list[str]:
    """What the requested phases, together with what is on disk, let us evaluate."""
    if "evaluate" not in config.phases:
        return []
    trained = "lora" in config.phases or (config.directory(method.label) / "lora").is_dir()
    return list(variant_names(method)[: 1 + trained])


def is_trained(config: ExperimentConfig, method: Method) -> bool:
    """Whether a run that was to train and not to be evaluated has done so."""
    products = [name for name in config.phases if name != "router" or method.trains_routers]
    directory = config.directory(method.label)
    return "evaluate" not in products and not config.overwrite and all((directory / name).is_dir() for name in products)


def finished_record(config: ExperimentConfig, method: Method) -> dict[str, Any] | None:
    """The record of a run that has nothing left to do, or None; raises ValueError as `check_directory` does."""
    directory = config.directory(method.label)
    check_directory(directory, config)
    failed = (directory / results.FAILURE).is_file()  # for all its earlier result
    if config.overwrite or failed or not (directory / CONFIG).is_file():
        return None
    record, wanted = results.read(directory), set(wanted_variants(config, method))
    return record if record is not None and wanted <= set(record["variants"]) else None


def check_directory(directory: Path, config: ExperimentConfig) -> None:
    """Raises ValueError if a run of this configuration cannot use the directory: nothing in it gets lost."""
    try:
        read_saved(directory / CONFIG)
    except ValueError:
        if directory.is_file():
            raise ValueError(f"run_dir={directory} is a file; choose another run_dir") from None
        if has_begun(directory):
            raise ValueError(f"run_dir={directory} holds no {CONFIG} of a run; choose another run_dir") from None
    else:
        if not config.overwrite:
            check_same(directory, config)


def has_begun(directory: Path) -> bool:
    """Whether a run directory holds more than its settings and why the last try failed."""
    names = {each.name for each in directory.iterdir()} if directory.is_dir() else set()
    return any(each not in (CONFIG, results.FAILURE) and not each.startswith(f".{CONFIG}.") for each in names)


def check_same(directory: Path, config: ExperimentConfig) -> None:
    """Raises ValueError if the run directory belongs to a configuration that gives other numbers."""
    if not has_begun(directory):  # then it belongs to none: a wrong `data.root` must not block the right one
        return
    try:
        saved = load_dict(read_saved(directory / CONFIG))
    except ValueError as error:
        raise ValueError(f"{error}; choose another run_dir, or delete {directory}") from error
    made = [each for each in ("tune", "refit") if (directory / each).is_dir()]
    saved = replace(saved, phases=[each for each in PHASES if each in (*saved.phases, *made)])
    old, new = (_flat(each.located().identity()) for each in (saved, config))
    if config.phases == ["evaluate"]:  # of whatever has been trained
        new["steps"] = old.get("steps")
    changed = [f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in sorted(old | new) if old.get(k) != new.get(k)]
    if changed:
        remedy = "give this run a note or another run_dir, or pass overwrite=true to delete it"
        raise ValueError(f"{directory} belongs to another configuration ({'; '.join(changed[:6])}); {remedy}")


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


@contextmanager
def taken_over(directory: Path, config: ExperimentConfig) -> Iterator[bool]:
    """Make the directory this run's if the body can start it, else restore it; yields whether a run is resumed."""
    replaced, resumed = directory.parent / f".{directory.name}.old", False
    if rank()[0] == 0:
        check_directory(directory, config)  # again: another process may have been here in between
        if config.overwrite and directory.exists():  # the old run is deleted once the new one has started
            if replaced.exists():  # by a start that was killed
                shutil.rmtree(directory)
            else:
                directory.rename(replaced)
        remove_torn(directory)
        resumed = has_begun(directory)
        write_atomically(directory / CONFIG, yaml_text(config.located().to_dict()))
    barrier()
    try:
        yield resumed
    except BaseException:
        if rank()[0] == 0:
            _restore(directory, replaced, resumed)
        raise
    if rank()[0] == 0:
        shutil.rmtree(replaced, ignore_errors=True)


def _restore(directory: Path, replaced: Path, resumed: bool) -> None:
    if replaced.exists():
        shutil.rmtree(directory, ignore_errors=True)
        replaced.rename(directory)
    elif not resumed:  # loggers may have written
        for each in directory.iterdir():
            if each.is_dir():
                shutil.rmtree(each)
            elif each.name not in (CONFIG, results.FAILURE):
                each.unlink()
