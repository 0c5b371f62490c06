"""The router-augmented language model. Names are loaded on first use, so that help does not wait for torch."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstlab.model.public import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # Python asks here for modules of this package as well, before it imports them.
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is None:
        public = import_module(f"{__name__}.public")
        if hasattr(public, name):
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
