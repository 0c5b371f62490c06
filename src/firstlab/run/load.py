"""Load what a run needs: its checked configuration and method, or a trained run as it stands on disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from firstlab.config import compose, instantiate
from firstlab.config.build import check_device, load_model, model_path
from firstlab.config.schema import PAPER_ORDER, TRAINED, ExperimentConfig, PhaseConfig, training_routers
from firstlab.data.task import Task
from firstlab.methods.base import Method
from firstlab.methods.none import Dense
from firstlab.metrics.comet import CometConfig
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.storage import ModelUnavailableError
from firstlab.run.directory import variant_names


class TrainedRun(NamedTuple):
    """A trained run as it stands on disk."""

    config: ExperimentConfig
    method: Method
    model: RouterAugmentedLM
    variant: str


def load_run(
    directory: Path, variant: str | None, overrides: dict[str, str] | None = None, config_dirs: Sequence[str] = ()
) -> TrainedRun:
    """Load a variant (base, base_lora, router or router_lora; None for the most trained one) of a run directory."""
    overrides = overrides or {}
    config, method = read(directory / "config.yaml", overrides, config_dirs)
    start: Path | None = directory / ("router" if method.trains_routers else "tune")
    if config.init_from is not None and not (directory / "router").is_dir():
        start = Path(model_path(config.init_from))
    elif not method.trains_routers and not (directory / "tune").is_dir():
        start = None
    if "model.path" in overrides:
        config = replace(config, init_from=None)  # which has a base of its own
    check_device(config.trainer)
    # Not the saved ones, which are how it was trained.
    devices, nodes = config.trainer.devices, config.trainer.num_nodes
    if {"trainer", "trainer.devices", "trainer.num_nodes"} & overrides.keys() and devices * nodes > 1:
        given = f"trainer.devices={devices}, trainer.num_nodes={nodes}"
        raise ValueError(f"{given}: a saved run is evaluated by one process; choose trainer=cpu or gpu")
    before, after = variant_names(method)
    recorded = {directory / name for name in TRAINED if (directory / f"{name}.yaml").is_file()}
    refitted = directory / "refit"
    folders = {"base": None, before: start, after: refitted if refitted in recorded else directory / "lora"}
    if variant is None:
        # What is recorded and lost is an error, not a reason to take less.
        variant = [name for name, each in folders.items() if each is None or each.is_dir() or each in recorded][-1]
        if variant == "base" and config.init_from is not None and start is not None:
            raise ValueError(f"init_from={config.init_from!r} is not there any more; put it back, or say variant=base")
    if variant not in folders:
        raise ValueError(f"variant={variant!r} is unknown; choose one of {', '.join(folders)}")
    folder = folders[variant]
    if folder is not None and not folder.is_dir():
        raise ValueError(f"variant={variant}: {folder} is not there; train it, or choose another variant")
    try:
        return TrainedRun(config, method, load_model(config, folder or model_path(config.model.path)), variant)
    except ModelUnavailableError as error:
        raise ValueError(f"{error}; if the base model has moved, give model.path=FOLDER") from error


def dense_counterpart(config: ExperimentConfig) -> tuple[ExperimentConfig, Method]:
    """The same settings with method=none, and as many steps of LoRA in all: what skipping is compared with."""
    directory = config.run_dir and f"{Path(config.run_dir)}-none"
    node = {"_target_": f"{Dense.__module__}.{Dense.__qualname__}"}
    phases = list(PAPER_ORDER) if "lora" in config.phases else ["evaluate"]
    evaluation = replace(config.evaluation, skip_rates=[])
    dense = replace(
        config, method=node, run_dir=directory, init_from=None, phases=phases, overwrite=False, evaluation=evaluation
    )
    if {"tune", "lora"} <= set(config.phases):
        phase = config.lora_phase
        steps = phase.max_steps and 2 * phase.max_steps
        note = "-".join(filter(None, [config.note, "as_tuned"]))
        dense = replace(dense, note=note, lora_phase=replace(phase, epochs=2 * phase.epochs, max_steps=steps))
    return _without_routers(dense), Dense()


def _without_routers(config: ExperimentConfig) -> ExperimentConfig:
    """What only routers use is left at its default, so that every method shares one dense run."""
    return replace(config, router=training_routers(), router_phase=PhaseConfig())


def load(composed: DictConfig) -> tuple[ExperimentConfig, Method]:
    """The checked configuration that Hydra composed, and its method; classes of the user's own may be named there."""
    config = compose.settings(composed, ExperimentConfig)
    instantiate.trust(instantiate.targets([config.method, config.data.task, config.logger]))
    return _checked(config)


def _checked(config: ExperimentConfig) -> tuple[ExperimentConfig, Method]:
    method = instantiate.build(config.method, "method", Method)
    if not isinstance(getattr(method, "name", None), str):
        raise ValueError(f"method._target_={config.method['_target_']!r}: the class has no `name`, as tables need")
    instantiate.check(config.data.task, "data.task", Task)
    if config.logger:
        instantiate.check(config.logger, "logger", Logger)
    if (rev := config.model.revision) is not None and Path(model_path(path := config.model.path)).is_dir():
        raise ValueError(f"model.revision={rev!r} is for models of the hub, and model.path={path!r} a folder; drop it")
    if not config.phases:
        config = replace(config, phases=list(PAPER_ORDER) if config.init_from else method.steps)
    if method.name == "none":
        config = _without_routers(config)
    if (kind := config.router.kind) != (fits := method.router_kind):
        other = "routes" if kind == "routes" else "first"
        raise ValueError(f"router.kind={kind} does not fit {method.name}: choose method={other}, or router.kind={fits}")
    if (rates := config.evaluation.skip_rates) and fits != "routes":
        raise ValueError(f"evaluation.skip_rates={rates}: {method.name} knows one rate; use method=routes, or none")
    if "refit" in config.phases and not (method.trains_routers and "lora" in config.phases):
        raise ValueError(f"phases={config.phases}: refit needs a method that trains routers, and lora before it")
    return config, method


def read(
    file: Path, overrides: dict[str, str] | None = None, config_dirs: Sequence[str] = ()
) -> tuple[ExperimentConfig, Method]:
    """The configuration in the config.yaml of a run, with some keys replaced, and its method.

    Saved text is data: it names no classes but firstlab's and the trusted ones, no logger and no program. Of the
    overrides, `data` and `trainer` name a file of these groups, in conf/ or one of `config_dirs`.
    """
    if not file.is_file():
        raise ValueError(f"{file} does not exist; run={file.parent} is not a run directory of firstlab.train")
    saved, overrides = compose.read_saved(file), dict(overrides or {})
    for group in {"data", "trainer"} & overrides.keys():
        name = overrides.pop(group)
        places = (compose.conf_dir(), *config_dirs)
        names = {each.stem for place in places for each in Path(place, group).glob("*.yaml")}
        if name not in names:
            raise ValueError(f"{group}={name!r} is unknown; choose one of {', '.join(sorted(names))}")
        saved[group] = compose.composed_config([*compose.search_path(config_dirs), f"{group}={name}"])[group]
        instantiate.trust(instantiate.targets(saved[group]))
    merged = compose.merge_saved(saved, file)
    merged.logger, comet = None, merged.evaluation.comet
    comet.command = CometConfig().command
    hub = comet.model is None or re.fullmatch(r"Unbabel/[\w.-]+", comet.model) and not Path(comet.model).exists()
    if not hub and "evaluation.comet.model" not in overrides:
        why = "which may hold code: name it again, or leave COMET out with evaluation.comet.model=null"
        raise ValueError(f"{file}: evaluation.comet.model={comet.model!r} is a checkpoint, {why}")
    instantiate.trust(value for key, value in overrides.items() if key.endswith("._target_"))
    for key, value in overrides.items():
        _replace(merged, key, value)
    return _checked(compose.settings(merged, ExperimentConfig))


def _replace(merged: DictConfig, key: str, value: str) -> None:
    if not value.strip():
        raise ValueError(f"{key}= has no value; write {key}=null for none")
    try:
        part = OmegaConf.select(merged, key)
        if OmegaConf.is_dict(part) and not isinstance(yaml.safe_load(value), dict):
            raise ValueError(f"{key}={value}: {key} is a group; give its keys, {', '.join(map(str, part))}")
        compose.refuse_misread(merged, [f"{key}={value}"])
        merged.merge_with_dotlist([f"{key}={value}"])
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value} is not valid YAML; quote the value, as in '{key}=\"...\"'") from error
    except OmegaConfBaseException as error:
        part = OmegaConf.select(merged, key.rpartition(".")[0]) if "." in key else merged
        keys = f"; keys there: {', '.join(map(str, part))}" if OmegaConf.is_dict(part) else ""
        raise ValueError(f"{key}={value}: {str(error).splitlines()[0]}{keys}") from error
