"""The router-augmented language model; names are loaded on first use, for help must not wait for torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstlab.model.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if not name.startswith("_"):
        public = import_module("firstlab.model.public")
        if name in public.__all__:
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
