"""firstlab: input-adaptive layer skipping for large language models."""

from firstlab.model import RouterAugmentedLM

__all__ = ["RouterAugmentedLM"]
__version__ = "0.1.0"
