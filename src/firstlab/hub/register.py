"""Make firstlab known to transformers and lm-evaluation-harness when those are imported; nothing waits for them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _to_transformers(auto: ModuleType) -> None:
    from firstlab.hub.config import FirstlabConfig

    def add_model() -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from firstlab.hub.modeling import BaseTokenizer, FirstlabForCausalLM

        AutoModelForCausalLM.register(FirstlabConfig, FirstlabForCausalLM, exist_ok=True)
        AutoTokenizer.register(FirstlabConfig, fast_tokenizer_class=BaseTokenizer, exist_ok=True)

    # The Auto classes read a folder's config before they look for its model.
    FirstlabConfig.when_read = staticmethod(add_model)
    auto.CONFIG_MAPPING.register(FirstlabConfig.model_type, FirstlabConfig, exist_ok=True)


def _to_harness(models: ModuleType) -> None:
    from lm_eval.api.registry import model_registry

    if "firstlab" not in model_registry:
        model_registry.register("firstlab", target="firstlab.hub.harness:FirstlabLM")


_WAITING: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _to_transformers,
    "lm_eval.models": _to_harness,
}


class _Watcher(MetaPathFinder):
    """Registers right behind the import of the modules that are waited for; finds nothing itself."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        register = _WAITING.pop(name, None)
        spec = None if register is None else importlib.util.find_spec(name)
        if register is None or spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register with what is imported already, and wait for the rest."""
    for name in [each for each in _WAITING if each in sys.modules]:
        _WAITING.pop(name)(sys.modules[name])
    sys.meta_path.insert(0, _Watcher())
