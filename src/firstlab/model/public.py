"""What `firstlab.model` offers."""

from firstlab.model.cache import RoutedCache
from firstlab.model.generation_options import stop_tokens
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lora import check_lora
from firstlab.model.output import RouterAugmentedOutput
from firstlab.model.prompt_cache import PromptReading
from firstlab.model.routers import Routers
from firstlab.model.routes import (
    EarlyExit,
    FixedRoutes,
    PrunedRoutes,
    Routes,
    StepRoutes,
    as_routes,
    layer_skips,
    routes_from_json,
    routes_to_json,
)
from firstlab.model.settings import LoraSettings, RouterSettings
from firstlab.model.storage import ModelUnavailableError, load_base_config, load_tokenizer

__all__ = [
    "EarlyExit",
    "FixedRoutes",
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
    "as_routes",
    "check_lora",
    "layer_skips",
    "load_base_config",
    "load_tokenizer",
    "routes_from_json",
    "routes_to_json",
    "stop_tokens",
]
