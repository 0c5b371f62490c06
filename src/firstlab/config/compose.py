"""From `conf/` and the command line, or from the config.yaml of a run, to a checked configuration."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from firstlab.config.schema import ExperimentConfig

if TYPE_CHECKING:
    # Imported where it is used: command-line help must not wait for torch.
    pass

Settings = TypeVar("Settings")


def conf_dir() -> str:
    """The `conf` folder: the repository's when there is one, else the copy inside the installed package."""
    in_repository = Path(__file__).resolve().parents[3] / "conf"
    inside_package = Path(__file__).resolve().parents[1] / "conf"
    return str(in_repository if (in_repository / "train.yaml").is_file() else inside_package)


def own_conf_dirs() -> list[str]:
    """Folders that the command line searches besides `conf_dir` (--config-dir, hydra.searchpath)."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    folders = [each for each in sources if each.schema == "file" and each.provider != "main"]
    return [each.path for each in folders if Path(each.path).is_dir()]


def search_path(folders: Sequence[str]) -> list[str]:
    """The override by which Hydra searches these folders, too; none for none."""
    quoted = ", ".join(json.dumps(f"file://{Path(each).resolve()}", ensure_ascii=False) for each in folders)
    return [f"hydra.searchpath=[{quoted}]"] if folders else []


def register() -> None:
    """Tell Hydra the schemas that the primary config files start from."""
    ConfigStore.instance().store(name="experiment_schema", node=ExperimentConfig)


def composed_config(overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration that `python -m firstlab.train OVERRIDES` would run, unchecked; nothing is built."""
    register()
    GlobalHydra.instance().clear()  # the entry point's own, which is done composing
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        composed = compose("train", [*search_path(own_conf_dirs()), *overrides])
    node = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


def settings(composed: DictConfig, schema: type[Settings]) -> Settings:
    """What Hydra composed for an entry point, as that entry point's dataclass.

    Raises:
        ValueError: A value is missing, of the wrong type, or refused by the dataclass.
    """
    try:
        found = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing: give {error.full_key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration: {str(error).strip().splitlines()[0]}") from error
    assert isinstance(found, schema)
    return found


def read_saved(file: Path) -> dict[str, Any]:
    """What the config.yaml of a run directory holds.

    Raises:
        ValueError: It is damaged, or not of a run; other programs have a config.yaml, too.
    """
    try:
        node = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({str(error).splitlines()[0]})") from error
    if not isinstance(node, dict) or not {"model", "method", "router_phase"} <= node.keys():
        raise ValueError(f"{file} is damaged, or not the configuration of a run of firstlab.train")
    return node


def load_dict(node: dict[str, Any]) -> ExperimentConfig:
    """A configuration from what `ExperimentConfig.to_dict` gave.

    Raises:
        ValueError: It does not fit this version's schema.
    """
    try:
        merged = OmegaConf.merge(_schema(), OmegaConf.create(_without_retired(node)))
    except OmegaConfBaseException as error:
        raise ValueError(f"saved configuration: {str(error).strip()}") from error
    assert isinstance(merged, DictConfig)
    return settings(merged, ExperimentConfig)


# Options of earlier versions that saved configurations still carry.
_RETIRED = ("codebook_rounds",)


def _without_retired(node: dict[str, Any]) -> dict[str, Any]:
    method = node.get("method")
    if not isinstance(method, dict):
        return node  # the schema says what is wrong with it
    return {**node, "method": {k: v for k, v in method.items() if k not in _RETIRED}}


@functools.cache
def _schema() -> DictConfig:
    schema = OmegaConf.structured(ExperimentConfig)
    assert isinstance(schema, DictConfig)
    return schema
