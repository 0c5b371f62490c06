"""Loading base models with errors a user can act on; saving and loading what was trained, in safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from firstlab.model.lm import RouterAugmentedLM

FORMAT = "firstlab"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_ROUTER_WEIGHTS = "routers.safetensors"
_AGAIN = "save the model again; in a run directory, delete this folder and give the training command again"
#: Folder of a base that was saved along.
_BASE = "base"
_PEFT_PREFIX = "base_model.model."


class ModelUnavailableError(ValueError):
    """A model or tokenizer cannot be loaded; the message says what to do."""


def _unavailable(path: str, error: Exception) -> ModelUnavailableError:
    text = str(error).lower()
    if isinstance(error, ImportError):
        way_out = "a package that it, or an option given with it, needs is missing: install it, or drop the option"
    elif "trust_remote_code" in text or "custom code" in text:
        way_out = "it needs code from the hub, which firstlab does not run; choose a model that transformers ships"
    elif "safetensors" in text and ("no file named" in text or "not appear to have a file named" in text):
        way_out = "it has no safetensors, the one format read; load it elsewhere and save_pretrained() it again"
    elif path and Path(path).exists():
        way_out = "the folder exists but cannot be read as a transformers causal LM"
    elif "gated" in text or "401" in text or "403" in text:
        way_out = "it is gated: accept its licence on the hub, then log in with `hf auth login` or set HF_TOKEN"
    else:
        way_out = (
            "no such folder, and the hub has no such model or cannot be reached: check the name, or download the "
            "model where there is a network and set model.path to its folder"
        )
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ModelUnavailableError(
        f"model.path={path!r} is not available: {way_out} ({type(error).__name__}: {first_line[:200]})"
    )


def load_base(path: str, **kwargs: Any) -> PreTrainedModel:
    """A causal LM from a hub id or folder, from safetensors, without remote code.

    Raises:
        ModelUnavailableError: It cannot be loaded, or lacks weights that its config asks for.
    """
    # Without trust_remote_code=False transformers would ask at the terminal.
    options = {"use_safetensors": True, "trust_remote_code": False, **kwargs}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        model, info = loaded
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise _unavailable(path, error) from error
    # transformers would draw these at random and go on.
    absent = sorted(info["missing_keys"])
    misfits = sorted(name for name, *_ in info["mismatched_keys"])
    if absent or misfits:
        faults = [f"{len(x)} {what} ({x[0]}, ...)" for x, what in ((absent, "missing"), (misfits, "misshapen")) if x]
        raise ModelUnavailableError(
            f"model.path={path!r}: the weights do not fit config.json: {' and '.join(faults)}; copy or download the "
            "whole model again"
        )
    return model


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id, a transformers folder, or a folder written by firstlab (its base model's).

    Args:
        path: Hub id or folder.
        revision: Hub revision.

    Raises:
        ModelUnavailableError: It cannot be loaded.
    """
    saved = read_config(path)
    location = str(path) if saved is None else base_location(path, saved)
    try:
        options = {} if revision is None else {"revision": revision}
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise _unavailable(location, error) from error


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The firstlab part of a folder's config.json, or None if `save_pretrained` did not write it."""
    file = Path(path) / "config.json"
    if not file.is_file():
        if (Path(path) / _ROUTER_WEIGHTS).is_file():
            # transformers would load the base and its adapter, and the routers would be fresh ones.
            raise ModelUnavailableError(f"{path} has {_ROUTER_WEIGHTS} but no config.json; {_AGAIN}")
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelUnavailableError(f"{file} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(config, dict):
        raise ModelUnavailableError(f"{file} holds no JSON object; {_AGAIN}")
    if config.get("model_type") != FORMAT:
        return None
    missing = [key for key in ("base_model_name_or_path", "router") if key not in config]
    if missing:
        raise ModelUnavailableError(f"{file} has no key {' and no key '.join(missing)}; {_AGAIN}")
    return config


def base_location(path: str | Path, config: dict[str, Any]) -> str:
    """Where the base model of a saved folder is: inside the folder if it was saved along, else where it was."""
    base = config["base_model_name_or_path"]
    return str(Path(path) / base) if base == _BASE else base


def save(model: RouterAugmentedLM, path: str | Path, save_base: bool) -> None:
    """See `RouterAugmentedLM.save_pretrained`.

    Raises:
        ValueError: The base has no name to find it by and is not saved along.
    """
    directory = Path(path)
    base = model.config._name_or_path
    if not base and not save_base:
        raise ValueError(
            "the base weights could not be found again: the model was not loaded from a path or hub id, or LoRA was "
            "merged into it; use save_pretrained(dir, save_base=True)"
        )
    if save_base and model.has_lora:
        raise ValueError("save_base=True writes plain weights; call merge_and_unload() first")
    adapter_name = _adapter_name(model)
    directory.mkdir(parents=True, exist_ok=True)
    if save_base or (base and Path(base).resolve() == (directory / _BASE).resolve()):
        base = _BASE
    elif Path(base).is_dir():
        base = str(Path(base).resolve())
    save_file({"weight": model.routers.weight.detach().cpu().contiguous()}, directory / _ROUTER_WEIGHTS)
    if adapter_name is not None:
        adapter = get_peft_model_state_dict(model.lm, adapter_name=adapter_name)
        save_file(
            {_PEFT_PREFIX + k.removeprefix(_PEFT_PREFIX): v.detach().cpu().contiguous() for k, v in adapter.items()},
            directory / _ADAPTER_WEIGHTS,
        )
        model.lm.peft_config[adapter_name].save_pretrained(directory)
    else:
        for name in (_ADAPTER_WEIGHTS, _ADAPTER_CONFIG):
            (directory / name).unlink(missing_ok=True)
    if save_base:
        model.lm.save_pretrained(directory / _BASE)
    config = {
        "model_type": FORMAT,
        "base_model_name_or_path": base,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.routers.weight.shape[1],
        "router": model.routers.settings.to_dict(),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _adapter_name(model: RouterAugmentedLM) -> str | None:
    """PEFT's name of the LoRA layers, None without any."""
    if not model.has_lora:
        return None
    names = list(model.lm.peft_config)
    if len(names) > 1:
        raise ValueError(
            f"the model has several adapters ({', '.join(names)}), and a folder holds one; merge them first"
        )
    return names[0]


def load_trained(model: RouterAugmentedLM, path: str | Path, config: dict[str, Any]) -> None:
    """Put saved routers and adapter into a freshly wrapped base.

    Raises:
        ValueError: Their shapes are not those of the base.
    """
    directory = Path(path)
    weight = _load_file(directory / _ROUTER_WEIGHTS)["weight"]
    if weight.shape != model.routers.weight.shape:
        raise ValueError(
            f"{directory}: routers of shape {list(weight.shape)} do not fit a base model with "
            f"{list(model.routers.weight.shape)} ([layers, hidden size]); was another base model put in its place?"
        )
    with torch.no_grad():
        model.routers.weight.copy_(weight)
    if (directory / _ADAPTER_WEIGHTS).is_file():
        adapter = {k.removeprefix(_PEFT_PREFIX): v for k, v in _load_file(directory / _ADAPTER_WEIGHTS).items()}
        if not (directory / _ADAPTER_CONFIG).is_file():
            raise ValueError(f"{directory} has {_ADAPTER_WEIGHTS} but no {_ADAPTER_CONFIG}; {_AGAIN}")
        inject_adapter_in_model(LoraConfig.from_pretrained(str(directory)), model.lm, "default")
        _copy_adapter(model.lm, adapter, directory)
        model.train(model.training)


def _copy_adapter(lm: PreTrainedModel, adapter: dict[str, torch.Tensor], directory: Path) -> None:
    # The names are those of the model's own modules. PEFT's loading would take them for names of the hub's checkpoint,
    # translate them, and leave out silently what then has no place.
    own = get_peft_model_state_dict(lm, adapter_name="default")
    shapes, saved = ({name: list(x.shape) for name, x in each.items()} for each in (own, adapter))
    if shapes != saved:
        name = next(each for each in {**saved, **shapes} if saved.get(each) != shapes.get(each))
        raise ValueError(
            f"{directory}: the adapter does not fit the base model: {name} is {saved.get(name, 'absent')} in the file "
            f"and {shapes.get(name, 'absent')} in the model; was another base model put in its place?"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(adapter[name])  # the state dict shares the parameters' memory


def _load_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is missing or truncated ({error}); {_AGAIN}") from error
