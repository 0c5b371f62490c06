"""Build the object that a `_target_` node of the configuration names.

Only firstlab's own classes, Lightning's loggers, and what the command line names (`trust`) are ever imported.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from firstlab.data.task import Task

#: What may stand at an option, by the last part of its name: classes of firstlab, and the loggers of conf/logger.
_OURS = {
    "method": r"firstlab\.methods\.\w+\.\w+",
    "task": r"firstlab\.data(\.\w+)+",
    "logger": r"lightning\.pytorch\.loggers\.(CSVLogger|TensorBoardLogger|WandbLogger|MLFlowLogger)",
}
_MIXTURE, _PART = "firstlab.data.mixture.Mixture", "firstlab.data.mixture.Part"
#: Classes and packages of the user's own that this process may import.
_trusted: set[str] = set()

_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}
_NAMES |= {Sequence: "a list", Mapping: "keys and values"}


def trust(names: Iterable[str]) -> None:
    """Let this process import these classes, or any class of these packages: the user has named them."""
    _trusted.update(names)


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` in a node."""
    if isinstance(node, Mapping):
        if isinstance(name := node.get("_target_"), str):
            yield name
        node = list(node.values())
    for value in node if isinstance(node, list | tuple) else ():
        yield from targets(value)


def build(node: Any, option: str, kind: type, **extra: Any) -> Any:
    """The object of a `_target_` node, of class `kind`; all errors become a ValueError of one line with the option."""
    target = check(node, option, kind, **extra)
    given = {key: value for key, value in node.items() if key != "_target_"}
    if node["_target_"] == _MIXTURE:
        given["parts"] = {key: build(part, f"{option}.parts.{key}", object) for key, part in node["parts"].items()}
    elif node["_target_"] == _PART:
        given["task"] = build(node["task"], f"{option}.task", Task)
    try:
        return target(**given | extra)
    except ValueError:
        raise
    except Exception as error:  # a constructor may fail in any way
        raise ValueError(f"{option}: {error}") from error


def check(node: Any, option: str, kind: type, **extra: Any) -> type:
    """The class of a `_target_` node, which must be allowed, and so must its arguments; no object is made."""
    group = "task" if ".parts." in option else option.rpartition(".")[2]
    if not isinstance(node, dict) or not isinstance(name := node.get("_target_"), str):
        raise ValueError(f"{option} needs a `_target_`; choose one with {option}=NAME from the group conf/{option}")
    target = _class(name, group, option)
    if not issubclass(target, kind):
        whose = "Lightning" if group == "logger" else "firstlab"
        raise ValueError(f"{option}._target_={name!r} is not a {whose} {group}")
    given = {key: value for key, value in node.items() if key != "_target_"}
    # The only objects inside an object.
    if name == _MIXTURE and isinstance(parts := given.get("parts"), dict):
        for key, part in parts.items():
            check(part, f"{option}.parts.{key}", _class(_PART, "task", option))
        given["parts"] = {}
    elif name == _PART:
        check(given.get("task"), f"{option}.task", Task)
        given["task"] = None
    _check_arguments(target, given, option, extra)
    return target


def _class(name: str, group: str, option: str) -> type:
    """Import a class, if its name is allowed at this option."""
    module, _, attribute = name.rpartition(".")
    ours = re.fullmatch(_OURS[group], name) is not None
    parents = {name[: dot.start()] for dot in re.finditer(r"\.", name)} | {name}
    if not ours and not parents & _trusted:
        why = f"what is saved runs no code of others: if you know it, give trust={name.partition('.')[0]}"
        raise ValueError(f"{option}._target_={name!r} stands in a saved file, and {why}")
    try:
        target = getattr(import_module(module), attribute)
    except Exception as error:  # importing a module may fail in any way
        raise ValueError(f"{option}._target_={name!r} cannot be imported: {' '.join(str(error).split())}") from error
    if not inspect.isclass(target) or (ours and target.__module__.partition(".")[0] not in ("firstlab", "lightning")):
        raise ValueError(f"{option}._target_={name!r} is not a class")
    return target


def _check_arguments(target: type, given: Mapping[str, Any], option: str, extra: Mapping[str, Any]) -> None:
    _refuse_nested(given, option)
    name, hints = f"{target.__module__}.{target.__qualname__}", _hints(target)
    parameters = inspect.signature(target).parameters.values()
    known = {each.name: each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for key, value in given.items():
        if key not in known and not takes_any:
            raise ValueError(f"{option}.{key} is unknown: {name} takes {', '.join(known) or 'nothing'}")
        if key in hints and not _fits(value, hints[key]):
            raise ValueError(f"{option}.{key}={value!r} is not allowed: it takes {_describe(hints[key])}")
    for key, each in known.items():
        if each.default is each.empty and key not in {*given, *extra}:
            raise ValueError(f"{option}.{key} is missing: {name} needs it")


def _refuse_nested(node: Any, option: str) -> None:
    """Raises ValueError for an object inside an argument, and for Hydra's own keys (`_partial_`, `_args_`, ...)."""
    if isinstance(node, list | tuple):
        node = dict(enumerate(node))
    for key, value in node.items() if isinstance(node, Mapping) else ():
        if isinstance(key, str) and re.fullmatch(r"_\w*_", key):
            raise ValueError(f"{option}.{key} is not allowed: arguments are plain values")
        _refuse_nested(value, f"{option}.{key}")


def with_defaults(node: Any, option: str) -> Any:
    """A node with the defaults of its dataclass, so that it stays the same when the class gets a new setting."""
    try:
        target = _class(node["_target_"], option, option)
    except (ValueError, TypeError, KeyError):
        return node
    if not is_dataclass(target):
        return node
    defaults = {each.name: each.default for each in fields(target) if each.default is not MISSING}
    found = {**node, **{key: value for key, value in defaults.items() if key not in node}}
    # 1 and 1.0 are one setting.
    takes_float = {key for key, hint in _hints(target).items() if float in (hint, *get_args(hint))}
    return {key: float(value) if key in takes_float and type(value) is int else value for key, value in found.items()}


def _hints(target: type) -> dict[str, Any]:
    init: Any = target.__init__  # type: ignore[misc]
    found: dict[str, Any] = {}
    for name, hint in getattr(init, "__annotations__", {}).items():
        with suppress(NameError):  # one by one: a library may name types that only its type checker imports
            found |= get_type_hints(SimpleNamespace(__annotations__={name: hint}), init.__globals__)
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is what a parameter's type hint says; what YAML cannot hold fits any hint."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool) and math.isfinite(value)
    if kind in (Sequence, list, tuple):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value if inner)
    return isinstance(value, kind) if kind in (bool, str, NoneType, Mapping, dict) else True


def _describe(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
