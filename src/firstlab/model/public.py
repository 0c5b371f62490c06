"""What `firstlab.model` offers."""
# ruff: noqa: F401

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
)
from firstlab.model.settings import LoraSettings, RouterSettings
from firstlab.model.storage import ModelUnavailableError, load_base_config, load_tokenizer
