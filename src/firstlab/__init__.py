"""firstlab: input-adaptive layer skipping for large language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from firstlab.hub.register import register_when_imported

if TYPE_CHECKING:
    from firstlab.model.lm import RouterAugmentedLM

__all__ = ["RouterAugmentedLM"]
__version__ = "0.2.0"

register_when_imported()


def __getattr__(name: str) -> Any:
    # Loaded on first use: command-line help must not wait for torch and transformers.
    if name == "RouterAugmentedLM":
        from firstlab.model.lm import RouterAugmentedLM

        return RouterAugmentedLM
    raise AttributeError(f"module 'firstlab' has no attribute {name!r}")
