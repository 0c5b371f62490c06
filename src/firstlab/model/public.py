"""What `firstlab.model` offers."""

from firstlab.model.cache import RoutedCache
from firstlab.model.exit_rule import EarlyExit
from firstlab.model.lm import RouterAugmentedLM, RouterAugmentedOutput
from firstlab.model.prompt_cache import PromptReading
from firstlab.model.routers import Routers
from firstlab.model.routes import PrunedRoutes, Routes, StepRoutes, layer_skips, routes_from_json, routes_to_json
from firstlab.model.settings import LoraSettings, RouterSettings
from firstlab.model.storage import ModelUnavailableError, load_tokenizer

__all__ = [
    "EarlyExit",
    "LoraSettings",
    "ModelUnavailableError",
    "PromptReading",
    "PrunedRoutes",
    "RoutedCache",
    "RouterAugmentedLM",
    "RouterAugmentedOutput",
    "RouterSettings",
    "Routers",
    "Routes",
    "StepRoutes",
    "layer_skips",
    "load_tokenizer",
    "routes_from_json",
    "routes_to_json",
]
