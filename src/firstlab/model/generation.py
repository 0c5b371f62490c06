"""Generation options that routed decoding cannot honour, named before anything runs."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

# Option -> (values that mean "off", reason and way out).
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_model": ((None,), "assisted decoding drafts tokens inside the prompt pass, before a route exists"),
    "prompt_lookup_num_tokens": (
        (None, 0),
        "prompt-lookup decoding drafts tokens inside the prompt pass, before a route exists",
    ),
    "assistant_early_exit": ((None,), "self-speculation drafts tokens inside the prompt pass, before a route exists"),
    "use_mtp": ((None, False), "multi-token prediction drafts tokens before a route exists"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search rewinds the cache that carries the routes"),
    "dola_layers": ((None,), "DoLa compares layers that a route may skip"),
    "cache_implementation": ((None, "dynamic"), "the routes live in the model's own dynamic cache"),
    "cache_config": ((None,), "the routes live in the model's own dynamic cache"),
    "custom_generate": ((None,), "its code may replace the cache that carries the routes"),
    "guidance_scale": ((None, 1, 1.0), "its second, unconditional pass would run unrouted"),
}


def check_generation_options(options: dict[str, Any]) -> None:
    """Refuse options that would give silently wrong text.

    Args:
        options: Keyword arguments meant for transformers' `generate`; a `generation_config` in them counts too.

    Raises:
        ValueError: Names the option, its value and the reason.
    """
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a transformers GenerationConfig; got {type(config).__name__}")

    def value(name: str) -> Any:
        return options[name] if name in options else getattr(config, name, None)

    if value("use_cache") is False:
        raise ValueError("use_cache=False cannot be used: the route of a prompt lives in its KV cache; drop the option")
    for name, (off, reason) in _UNSUPPORTED.items():
        if value(name) not in off:
            raise ValueError(f"{name}={value(name)!r} cannot be used with routed decoding: {reason}; drop the option")
