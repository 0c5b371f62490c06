"""Load base models with errors that a user can act on; save and load what was trained, in safetensors only."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import find_adapter_config_file

from firstlab.model.lora import has_lora, inject_lora, merge_lora
from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers, RouterSettings

FORMAT = "firstlab"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_CONFIG = "adapter_config.json"
_ROUTER_WEIGHTS = "routers.safetensors"
_AGAIN = (
    "save the model again; in a run directory, delete this folder, and result.json if there is one, and give the "
    "training command again"
)
#: Folder of the adapter where a model is published.
_PUBLISHED = "adapter/"
#: Folder of a base that was saved along.
_BASE = "base"
_PEFT_PREFIX = "base_model.model."
#: Which files of a folder of firstlab are downloaded: nothing that can hold code.
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md")
#: Where a folder of firstlab is found.
FOLDER_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")
#: Where a hub's files are found; the other options say how a model is loaded.
_HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "proxies")


class ModelUnavailableError(ValueError):
    """A model or tokenizer cannot be loaded; the message says what to do."""


@dataclass(frozen=True)
class SavedModel:
    """What config.json of a folder written by firstlab says."""

    folder: Path
    base: str  # hub id or folder of the base model
    router: RouterSettings
    files: Mapping[str, str] | None  # the others, with their SHA-256; None if it was saved before there were any

    @property
    def adapter(self) -> str:
        """Where in the folder the adapter's files are: a prefix of their names."""
        return _PUBLISHED if f"{_PUBLISHED}{_ADAPTER_WEIGHTS}" in (self.files or ()) else ""

    @property
    def has_adapter(self) -> bool:
        if self.files is not None:
            return f"{self.adapter}{_ADAPTER_WEIGHTS}" in self.files
        return any((self.folder / name).exists() for name in (_ADAPTER_CONFIG, _ADAPTER_WEIGHTS))


def expanded(path: str | Path) -> str:
    """A hub id or folder, with `~` spelled out."""
    return os.path.expanduser(path) if str(path).startswith("~") else str(path)


def _unavailable(path: str, error: Exception, what: str = "") -> ModelUnavailableError:
    text = str(error).lower()
    if isinstance(error, ImportError):
        way_out = "a package that it, or an option given with it, needs is missing: install it, or drop the option"
    elif "trust_remote_code" in text or "custom code" in text:
        way_out = "it needs code from the hub, which firstlab does not run; choose a model that transformers ships"
    elif "safetensors" in text and ("no file named" in text or "not appear to have a file named" in text):
        way_out = "it has no safetensors, the one format read; load it elsewhere and save_pretrained() it again"
    elif path and Path(path).exists():
        way_out = "the folder exists but cannot be read as a transformers causal LM"
        if what:
            way_out = f"the folder holds no {what} that can be read; put it there with {what}.save_pretrained({path!r})"
    elif "gated" in text or "401" in text or "403" in text:
        way_out = "it is gated: accept its licence on the hub, then log in with `hf auth login` or set HF_TOKEN"
    else:
        way_out = (
            "no such folder, and the hub has no such model or cannot be reached: check the name, or download the "
            "model where there is a network and set model.path to its folder"
        )
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    subject = f"the {what} of model.path={path!r}" if what else f"model.path={path!r}"
    return ModelUnavailableError(f"{subject} is not available: {way_out} ({type(error).__name__}: {first_line[:200]})")


def load_base(path: str | Path, merge: bool = False, **kwargs: Any) -> PreTrainedModel:
    """A causal LM from a hub id or folder, from safetensors, without remote code; ModelUnavailableError if it fails.

    With `merge`, the adapter of a PEFT folder becomes part of the weights, and the folder stays the model's name.
    """
    path = expanded(path)
    # Without trust_remote_code=False transformers would ask at the terminal.
    options = {"use_safetensors": True, "trust_remote_code": False, **kwargs}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
    try:
        if (found := _checked_adapter(path, hub, "attn_implementation" in kwargs)) is not None:
            if merge and not (Path(path) / "config.json").is_file():
                return _merged(path, found, hub, {k: v for k, v in kwargs.items() if k not in hub})
            if found.get("use_dora"):
                raise ModelUnavailableError(
                    f"model.path={path!r} is DoRA, of which transformers loses the magnitudes: load it with merge=True"
                )
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except Exception as error:  # a damaged folder breaks its readers in many ways
        machine = isinstance(error, RuntimeError | MemoryError) and not isinstance(error, RecursionError)
        if machine or isinstance(error, ModelUnavailableError):
            raise
        raise _unavailable(path, error) from error
    model, info = loaded
    # transformers would draw these at random and go on.
    misfits = {"missing": info["missing_keys"], "misshapen": [name for name, *_ in info["mismatched_keys"]]}
    if faults := [f"{len(names)} {what} ({min(names)}, ...)" for what, names in misfits.items() if names]:
        raise ModelUnavailableError(
            f"model.path={path!r}: the weights do not fit config.json: {' and '.join(faults)}; copy or download the "
            "whole model again"
        )
    if merge and has_lora(model):  # beside the base's own files
        merge_lora(model)
        model.config._name_or_path = path
    return model


def _merged(path: str, found: dict[str, Any], hub: dict[str, Any], options: dict[str, Any]) -> PreTrainedModel:
    """The base of a PEFT adapter with the adapter in its weights; PEFT knows all kinds of LoRA, transformers few."""
    if Path(path).exists() and not (Path(path) / _ADAPTER_WEIGHTS).is_file():
        raise ModelUnavailableError(f"{path} has no {_ADAPTER_WEIGHTS}, the one format read; save the adapter again")
    config = _adapter_config(found)
    base = load_base(str(config.base_model_name_or_path), **options)
    adapted: Any = PeftModel.from_pretrained(base, path, config=config, **hub)
    model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    model.config._name_or_path = path
    return model.requires_grad_(True)


def _checked_adapter(path: str, hub: dict[str, Any], attention_is_named: bool) -> dict[str, Any] | None:
    """What the config of a folder's PEFT adapter says, if there is one, as the files are looked into first.

    Refused are a damaged generation config, which transformers would replace in silence, and names of code to import.
    """
    refuse_bad_ends(Path(path))
    configs, found = [(path, hub)], None
    if (adapter := find_adapter_config_file(path, **hub)) is not None:
        found = _read_object(Path(adapter))
        _refuse_packages(adapter, found)
        configs.append((str(found.get("base_model_name_or_path")), {}))
    for place, where in [] if attention_is_named else configs:
        try:
            config = AutoConfig.from_pretrained(place, trust_remote_code=False, **where)
        except Exception:  # what cannot be read asks for nothing
            continue
        _refuse_kernels(path, config)
    return found


def refuse_bad_ends(folder: Path) -> None:
    """ModelUnavailableError if the folder's generation config has other end-of-text tokens than ids."""
    file = folder / "generation_config.json"
    ends = _read_object(file).get("eos_token_id") if file.is_file() else None
    if not all(isinstance(each, int | None) for each in (ends if isinstance(ends, list) else [ends])):
        raise ModelUnavailableError(f"{file}: eos_token_id={ends!r} must be a token id or a list of them")


def _refuse_kernels(path: str, config: PretrainedConfig) -> None:
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if "/" in (name := str(getattr(part, "_attn_implementation", ""))):
            raise ModelUnavailableError(
                f"model.path={path!r}: config.json asks for attention code of the hub, {name}, which runs only if you "
                "name it yourself: set model.attn_implementation to it, or to sdpa"
            )


def _refuse_packages(file: str | Path, adapter: Mapping[str, Any]) -> None:
    if adapter.get("megatron_config"):
        raise ModelUnavailableError(f"{file}: megatron_config imports a package, which a saved adapter may not do")


def load_base_config(
    path: str | Path,
    revision: str | None = None,
    attn_implementation: str | None = None,
    gguf_file: str | None = None,
) -> PretrainedConfig:
    """The config of a base model, without its weights; of a folder written by firstlab, that of its base."""
    location = _base_of(path)
    gguf = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, revision=revision, **gguf)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation
    except Exception as error:  # values of a wrong type break it in many ways
        raise _unavailable(location, error) from error
    _refuse_kernels(location, config)
    return config


def load_tokenizer(path: str | Path, revision: str | None = None, gguf_file: str | None = None) -> Tokenizer:
    """The tokenizer of a hub id or folder; of a folder of firstlab or PEFT without one, that of its base.

    That of a GGUF file counts where its folder has none.
    """
    own = (Path(expanded(path)) / "tokenizer_config.json").is_file()
    location = expanded(path) if own else _base_of(path)
    given = {"revision": revision, "gguf_file": None if own else gguf_file}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False, **options)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise _unavailable(location, error, "tokenizer") from error


def _base_of(path: str | Path) -> str:
    saved, adapter = read_config(path), Path(expanded(path)) / _ADAPTER_CONFIG
    if saved is not None:
        return saved.base
    if adapter.is_file() and not (adapter.parent / "config.json").is_file():  # of PEFT
        return str(_read_object(adapter).get("base_model_name_or_path"))
    return expanded(path)


def local_folder(path: str | Path, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The folder of a saved model, downloaded if `path` is a hub id; None if firstlab did not write it.

    Raises:
        ModelUnavailableError: The hub does not have it or cannot be reached.
    """
    place, inside = Path(expanded(path)), subfolder or "."
    for wanted in () if place.exists() else (("config.json",), _FILES):
        patterns = [os.path.normpath(f"{inside}/{each}") for each in wanted]
        try:
            place = Path(snapshot_download(str(path), allow_patterns=patterns, **hub))
        except (OSError, ValueError) as error:
            raise _unavailable(str(path), error) from error
        if read_config(place / inside) is None:
            return None  # whose weights are not ours to fetch
    return None if read_config(place / inside) is None else place / inside


def find_saved(path: str | Path, options: dict[str, Any]) -> tuple[SavedModel | None, dict[str, Any]]:
    """What config.json of a folder or hub id says, as `read_config`, and the options that are left for its base."""
    names = ("subfolder",) if Path(expanded(path)).exists() else FOLDER_OPTIONS
    folder = local_folder(path, **{name: options[name] for name in names if name in options})
    if folder is None:
        return None, options
    return read_config(folder), {name: value for name, value in options.items() if name not in names}


def read_config(path: str | Path) -> SavedModel | None:
    """What a folder's config.json says, or None if `save_pretrained` did not write it."""
    folder = Path(expanded(path))
    file = folder / "config.json"
    config = _read_object(file) if file.is_file() else None
    if config is None or config.get("model_type") != FORMAT:
        if not (folder / _ROUTER_WEIGHTS).is_file():
            return None
        # transformers would load the base and its adapter, and the routers would be fresh ones.
        if config is None:
            raise ModelUnavailableError(f"{path} has {_ROUTER_WEIGHTS} but no config.json; {_AGAIN}")
        raise ModelUnavailableError(f"{file} beside {_ROUTER_WEIGHTS} must have model_type={FORMAT!r}; {_AGAIN}")
    if missing := [key for key in ("base_model_name_or_path", "router") if key not in config]:
        raise ModelUnavailableError(f"{file} has no key {' and no key '.join(missing)}; {_AGAIN}")
    base, files = config["base_model_name_or_path"], config.get("files")
    if not isinstance(base, str) or not isinstance(files, dict | None):
        raise ModelUnavailableError(f"{file}: base_model_name_or_path must be text and files an object; {_AGAIN}")
    try:
        router = RouterSettings(**config["router"])
    except (TypeError, ValueError) as error:
        raise ModelUnavailableError(f"{file}: router={config['router']!r} ({error}); {_AGAIN}") from error
    return SavedModel(folder, str(folder / base) if base == _BASE else base, router, files)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelUnavailableError(f"{file} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(found, dict):
        raise ModelUnavailableError(f"{file} holds no JSON object; {_AGAIN}")
    return found


def save(
    lm: PreTrainedModel,
    routers: Routers | RouteRouter,
    path: str | Path,
    save_base: bool,
    tokenizer: str = "",
    published: bool = False,
) -> None:
    """Write config.json, routers, the adapter if there is one and, if asked, the base with the `tokenizer` of a path.

    With `published` the adapter gets a folder of its own: beside config.json, transformers would take a repository of
    the hub for an adapter, and leave out its routers.
    """
    directory = Path(expanded(path))
    base = lm.config._name_or_path
    if not base and not save_base:
        raise ValueError(
            "the base weights could not be found again: the model was not loaded from a path or hub id, or LoRA was "
            "merged into it; use save_pretrained(dir, save_base=True)"
        )
    adapters = [*lm.peft_config] if has_lora(lm) else []
    if len(adapters) > 1:
        several = ", ".join(adapters)
        raise ValueError(f"the model has several adapters ({several}), and a folder holds one; merge them first")
    if save_base and adapters:
        raise ValueError("save_base=True writes plain weights; call merge_and_unload() first")
    directory.mkdir(parents=True, exist_ok=True)
    if save_base or (base and Path(base).resolve() == (directory / _BASE).resolve()):
        base = _BASE
    elif Path(base).is_dir():
        base = str(Path(base).resolve())
    _write(directory / _ROUTER_WEIGHTS, routers.state_dict())
    names, place = [_ROUTER_WEIGHTS], _PUBLISHED if published else ""
    for name, each in product((_ADAPTER_WEIGHTS, _ADAPTER_CONFIG), ("", _PUBLISHED)):  # of what was there before
        (directory / f"{each}{name}").unlink(missing_ok=True)
    for adapter in adapters:
        (directory / place).mkdir(exist_ok=True)
        weights = get_peft_model_state_dict(lm, adapter_name=adapter)
        prefixed = {_PEFT_PREFIX + k.removeprefix(_PEFT_PREFIX): v for k, v in weights.items()}
        _write(directory / f"{place}{_ADAPTER_WEIGHTS}", prefixed)
        lm.peft_config[adapter].save_pretrained(directory / place)
        names += [f"{place}{_ADAPTER_WEIGHTS}", f"{place}{_ADAPTER_CONFIG}"]
    if save_base:
        lm.save_pretrained(directory / _BASE)
        with suppress(ModelUnavailableError):  # many models have none; whoever needs it is told so
            if tokenizer:
                load_tokenizer(tokenizer).save_pretrained(directory / _BASE)
    config = {
        "model_type": FORMAT,
        "base_model_name_or_path": base,
        "num_hidden_layers": routers.num_layers,
        "hidden_size": lm.config.get_text_config(decoder=True).hidden_size,
        "router": asdict(routers.settings),
        "files": {name: _sha256(directory / name) for name in names},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, file)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_trained(lm: PreTrainedModel, routers: Routers | RouteRouter, saved: SavedModel) -> None:
    """Put saved routers and adapter into a freshly wrapped base."""
    adapter = [f"{saved.adapter}{name}" for name in (_ADAPTER_WEIGHTS, _ADAPTER_CONFIG)]
    names = [_ROUTER_WEIGHTS, *(adapter if saved.has_adapter else [])]
    for name in names:
        if not (saved.folder / name).is_file():
            raise ValueError(f"{saved.folder} was saved with {name}, and it is missing; {_AGAIN}")
    found = _load_file(saved, _ROUTER_WEIGHTS)
    if isinstance(routers, RouteRouter):
        try:
            routers.make_room(found)
        except ValueError as error:
            raise ValueError(f"{saved.folder / _ROUTER_WEIGHTS} {error}; {_AGAIN}") from error
    _copy(saved, _ROUTER_WEIGHTS, found, routers.state_dict())
    if saved.has_adapter:
        weights = {k.removeprefix(_PEFT_PREFIX): v for k, v in _load_file(saved, adapter[0]).items()}
        file = saved.folder / adapter[1]
        settings = _read_object(file)
        _refuse_packages(file, settings)
        try:
            inject_lora(lm, _adapter_config(settings))
        except (TypeError, ValueError, LookupError, AttributeError, NotImplementedError, re.error) as error:
            raise ValueError(f"{file} cannot be used ({type(error).__name__}: {error}); {_AGAIN}") from error
        # The names are those of the model's own modules. PEFT's loading would take them for names of the hub's
        # checkpoint, translate them, and leave out silently what then has no place.
        _copy(saved, adapter[0], weights, get_peft_model_state_dict(lm, adapter_name="default"))
    for name in names:  # last: what is wrong with a file says more than that it has changed
        if saved.files is not None and saved.files.get(name) != _sha256(saved.folder / name):
            raise ValueError(f"{saved.folder / name} is not the file that was saved with config.json; {_AGAIN}")


def _adapter_config(found: dict[str, Any]) -> LoraConfig:
    if found.pop("peft_type", "LORA") != "LORA":
        raise ValueError("peft_type must be LORA")
    known = {field.name for field in fields(LoraConfig)}
    # A newer PEFT's keys may be there, as long as they are off.
    if unknown := sorted(key for key in found.keys() - known if found[key]):
        raise ValueError(f"the installed PEFT knows no {unknown[0]!r}")
    numbers = dict.fromkeys(("r", "lora_alpha", "lora_dropout"), (int | float, "a number"))
    texts = {"base_model_name_or_path": (str | None, "text"), "target_modules": (str | list, "names of modules")}
    for key, (kind, wanted) in (texts | numbers).items():
        if isinstance(found.get(key), bool) or not isinstance(found.get(key), kind):
            raise ValueError(f"{key}={found.get(key)!r} must be {wanted}")
    return LoraConfig(**{key: value for key, value in found.items() if key in known})


def _load_file(saved: SavedModel, name: str) -> dict[str, torch.Tensor]:
    try:
        return load_file(saved.folder / name)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{saved.folder / name} is missing or truncated ({error}); {_AGAIN}") from error


def _copy(saved: SavedModel, name: str, found: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into the parameters of the same names, whose memory `own` shares."""
    file = saved.folder / name
    shapes, given = ({key: list(x.shape) for key, x in each.items()} for each in (own, found))
    if shapes != given:
        key = next(each for each in {**given, **shapes} if given.get(each) != shapes.get(each))
        raise ValueError(
            f"{file}: the weights do not fit a base model like this: {key} is {given.get(key, 'absent')} in the file "
            f"and {shapes.get(key, 'absent')} in the model; was another base model put in its place?"
        )
    with torch.no_grad():
        for key, weight in own.items():
            if not found[key].is_floating_point() or not found[key].isfinite().all():
                raise ValueError(
                    f"{file}: {key} ({found[key].dtype}) holds something other than finite numbers; {_AGAIN}"
                )
            weight.copy_(found[key])
