"""What a `_target_` node of the configuration names becomes an object here, after a look at its arguments."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate

_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    Sequence: "a list",
    Mapping: "keys and values",
}


def build(node: Any, option: str, **extra: Any) -> Any:
    """Instantiate a `_target_` node; errors become one line that names the option.

    Raises:
        ValueError: No `_target_`, unknown target, or arguments that it does not know, lacks or refuses.
    """
    check(node, option, **extra)
    try:
        return instantiate(node, _convert_="object", **extra)
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(str(cause) if isinstance(cause, ValueError) else f"{option}: {cause}") from error


def check(node: Any, option: str, **extra: Any) -> None:
    """Look at a `_target_` node without making its object.

    Raises:
        ValueError: No `_target_`, unknown target, or arguments that it does not know or lacks, or of the wrong type.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ValueError(f"{option} needs a `_target_`; choose one with {option}=NAME from the group conf/{option}")
    name = node["_target_"]
    try:
        target = get_object(name)
    except Exception as error:  # importing a module may fail in any way
        raise ValueError(f"{option}._target_={name!r} cannot be imported: {' '.join(str(error).split())}") from error
    if not inspect.isclass(target):
        raise ValueError(f"{option}._target_={name!r} is not a class")
    parameters = inspect.signature(target).parameters.values()
    known = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    given = {key: value for key, value in node.items() if key != "_target_"}
    unknown = [key for key in given if key not in known]
    if unknown and not any(each.kind is each.VAR_KEYWORD for each in parameters):
        raise ValueError(f"{option}.{unknown[0]} is unknown: {name} takes {', '.join(known) or 'nothing'}")
    for each in parameters:
        if each.name in known and each.default is each.empty and each.name not in given | extra:
            raise ValueError(f"{option}.{each.name} is missing: {name} needs it")
    hints = _hints(target)
    for key, value in given.items():
        if key in hints and not _fits(value, hints[key]):
            raise ValueError(f"{option}.{key}={value!r} is not allowed: it takes {_describe(hints[key])}")


def with_floats(target: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` with whole numbers as floats where the target's parameters are floats: 1 and 1.0 are one setting."""
    hints = _hints(target)
    takes_float = {key for key, hint in hints.items() if float in (hint, *get_args(hint))}
    return {key: float(value) if key in takes_float and type(value) is int else value for key, value in values.items()}


def _hints(target: type) -> dict[str, Any]:
    init: Any = target.__init__  # type: ignore[misc]
    found: dict[str, Any] = {}
    for name, hint in getattr(init, "__annotations__", {}).items():
        # One by one: a library may name types that only its type checker imports.
        with suppress(NameError):
            found |= get_type_hints(SimpleNamespace(__annotations__={name: hint}), init.__globals__)
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a YAML file is what a parameter's type hint says; what YAML cannot hold fits any hint."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind in (Sequence, list, tuple):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value if inner)
    return isinstance(value, kind) if kind in (bool, str, NoneType, Mapping, dict) else True


def _describe(hint: Any) -> str:
    kind = get_origin(hint) or hint
    if kind in (Union, UnionType):
        return " or ".join(map(_describe, get_args(hint)))
    return _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
