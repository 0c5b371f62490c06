"""Compose a configuration from `conf/` and the command line, or read one that a run saved."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from firstlab.config.schema import ExperimentConfig
from firstlab.store.files import read_yaml

Settings = TypeVar("Settings")


def conf_dir() -> str:
    """The `conf` folder: the repository's when there is one, else the copy inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    in_repository = package.parents[1] / "conf"
    return str(in_repository if (in_repository / "train.yaml").is_file() else package / "conf")


def own_conf_dirs() -> list[str]:
    """Folders that the command line searches besides `conf_dir` (--config-dir, hydra.searchpath)."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    own = [each.path for each in sources if each.schema == "file" and each.provider != "main"]
    return [each for each in own if Path(each).is_dir()]


def search_path(folders: Sequence[str]) -> list[str]:
    """The override by which Hydra searches these folders, too; none for none."""
    quoted = ", ".join(json.dumps(f"file://{Path(each).resolve()}", ensure_ascii=False) for each in folders)
    return [f"hydra.searchpath=[{quoted}]"] if folders else []


def register() -> None:
    """Tell Hydra the schema of an experiment."""
    store_schema("experiment_schema", ExperimentConfig)


def store_schema(name: str, schema: type) -> None:
    """Tell Hydra the schema that a primary config file starts from."""
    ConfigStore.instance().store(name=name, node=_writable(OmegaConf.structured(schema)))


def _writable(node: Any) -> Any:
    """Let options be set one by one: OmegaConf makes nodes of frozen dataclasses read-only."""
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, None)
        for key in node:
            if not OmegaConf.is_missing(node, key):
                _writable(node[key])
    return node


_SCHEMA = _writable(OmegaConf.structured(ExperimentConfig))


def compose_file(name: str, overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes of conf/NAME.yaml, in the place of what this process has composed before."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose(name, list(overrides))


def composed_config(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration that `python -m firstlab.train OVERRIDES` would run, unchecked; nothing is built."""
    register()
    composed = compose_file("train", [*search_path(own_conf_dirs()), *overrides])
    node: Any = OmegaConf.to_container(composed, resolve=True)
    return dict(node)


def settings(composed: DictConfig, schema: type[Settings]) -> Settings:
    """What Hydra composed for a command, as that command's dataclass; raises ValueError for any value it refuses."""
    try:
        _refuse_unknown(composed)
        expand_home(composed)
        found = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing: give {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {str(error).strip().splitlines()[0]}") from error
    if not isinstance(found, schema):
        raise ValueError(f"this is no configuration of this command, which takes {schema.__name__}")
    return found


def expand_home(composed: DictConfig) -> None:
    """Put the home folder in the place of `~`, in every option alike."""

    def walk(node: Any, path: str) -> None:
        if isinstance(node, str) and node.startswith("~"):
            OmegaConf.update(composed, path, os.path.expanduser(node))
        elif isinstance(node, dict | list):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                walk(value, f"{path}[{key}]" if path else str(key))

    walk(OmegaConf.to_container(composed), "")


def allowed_keys(key: str, overrides: Sequence[str], config_name: str) -> str:
    """Why `key` is wrong: the deepest part of it that exists with these overrides, and the keys that part has."""
    node: Any = compose_file(config_name, overrides)
    parts, path = key.split("."), []
    while parts and OmegaConf.is_dict(node) and parts[0] in node:
        path.append(parts.pop(0))
        node = node[path[-1]]
    keys = list(map(str, node)) if OmegaConf.is_dict(node) else []
    more = f"; another argument of its class is added: +{key}=..." if "_target_" in keys and len(parts) == 1 else ""
    return _unknown(key, ".".join(path), parts[0] if parts else "", keys) + more


def _unknown(key: str, where: str, part: str, keys: Sequence[str]) -> str:
    known = ", ".join(keys) or "none"
    return f"{key} is unknown: {where or 'the configuration'} has no key {part!r}; its keys are {known}"


def _refuse_unknown(node: DictConfig, path: str = "") -> None:
    """Raises ValueError for a key that a plus has added beside those of a dataclass."""
    if not is_dataclass(kind := OmegaConf.get_type(node)):
        return
    known = [each.name for each in fields(kind)]
    for key in map(str, node):
        if key not in known:
            raise ValueError(_unknown(path + key, path.rstrip("."), key, known))
        if not OmegaConf.is_missing(node, key) and OmegaConf.is_dict(node[key]):
            _refuse_unknown(node[key], f"{path}{key}.")


def refuse_misread(config: DictConfig, arguments: Sequence[str]) -> None:
    """Raises ValueError for what Hydra would misread: KEY=1 as true, and GROUP=[A,B] as the two merged into one."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if re.fullmatch(r"[-+]?\d+", value) and isinstance(OmegaConf.select(config, key), bool):
            raise ValueError(f"{argument} is not allowed: {key} takes true or false")
        if value.startswith("[") and OmegaConf.is_dict(OmegaConf.select(config, key)):
            raise ValueError(f"{argument} is not allowed: choose one {key}")


def read_saved(file: Path) -> dict[str, Any]:
    """What the config.yaml of a run holds; ValueError if it is damaged, or of another program."""
    try:
        node = read_yaml(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(node, dict) or not {"model", "method", "router_phase"} <= node.keys():
        raise ValueError(f"{file} is damaged, or not the configuration of a run of firstlab.train")
    return node


def merge_saved(node: dict[str, Any], file: str | Path = "saved configuration") -> DictConfig:
    """The schema filled with what `ExperimentConfig.to_dict` gave; ValueError if that does not fit this version's."""
    try:
        _refuse_interpolations(node, file)
        merged: Any = OmegaConf.merge(_SCHEMA, node)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{file}: {str(error).strip().splitlines()[0]}") from error
    return merged


def load_dict(node: dict[str, Any]) -> ExperimentConfig:
    """A configuration from what `ExperimentConfig.to_dict` gave, to compare; see `firstlab.run.load` to use it."""
    return settings(merge_saved(node), ExperimentConfig)


def _refuse_interpolations(node: Any, file: str | Path) -> None:
    parts = (*node.keys(), *node.values()) if isinstance(node, dict) else node if isinstance(node, list) else ()
    for part in parts:
        if isinstance(part, str) and "${" in part:
            raise ValueError(f"{file} holds {part!r}: what is saved is plain data; write the value itself")
        _refuse_interpolations(part, file)
