"""The router-augmented language model. Imports nothing else of firstlab."""

from firstlab.model.cache import RoutedCache
from firstlab.model.lm import RouterAugmentedLM, RouterAugmentedOutput
from firstlab.model.lora import LoraSettings
from firstlab.model.routers import Routers, RouterSettings
from firstlab.model.storage import ModelUnavailableError, load_tokenizer

__all__ = [
    "LoraSettings",
    "ModelUnavailableError",
    "RoutedCache",
    "RouterAugmentedLM",
    "RouterAugmentedOutput",
    "RouterSettings",
    "Routers",
    "load_tokenizer",
]
