"""Generation options: refuse those that routed decoding cannot honour, pin the others, and collect stop tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from torch import nn
from transformers import GenerationConfig

# Before 5.23 `prefill_chunk_size` cuts the tokens that a given cache already holds into chunks again.
CHUNKS_REPEAT_THE_CACHE = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 23)

_DRAFTS = "it drafts tokens inside the prompt pass, before a route exists"
_OWN_CACHE = "the routes live in the model's own dynamic cache"
_HUB_CODE = "it runs code from the hub that may replace the cache"
# Option -> (values that mean "off", reason). transformers itself reads "hybrid", of older configs, as "dynamic".
_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_model": ((None,), _DRAFTS),
    "prompt_lookup_num_tokens": ((None,), _DRAFTS),
    "assistant_early_exit": ((None,), _DRAFTS),
    "speculation_type": ((None,), _DRAFTS),
    "use_mtp": ((None, False), _DRAFTS),
    "is_assistant": ((None, False), "a draft model's cache is rewound into the prompt pass"),
    "penalty_alpha": ((None, 0, 0.0), "contrastive search rewinds the cache that carries the routes"),
    "dola_layers": ((None,), "DoLa compares layers that a route may skip"),
    "num_beam_groups": ((None, 1), _HUB_CODE),
    "constraints": ((None,), _HUB_CODE),
    "force_words_ids": ((None,), _HUB_CODE),
    "custom_generate": ((None,), _HUB_CODE),
    "token_healing": ((None, False), "it tokenizes the prompt again, so that padding and prompt length may change"),
    "cache_implementation": ((None, "hybrid"), _OWN_CACHE),
    "cache_config": ((None,), _OWN_CACHE),
    "guidance_scale": ((None, 1, 1.0), "its second, unconditional pass would run unrouted"),
}


def option_value(name: str, options: dict[str, Any], defaults: GenerationConfig) -> Any:
    """The value in force: the keyword, else that of `generation_config`, else the model's own."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(defaults, name, None) if given is None else given


def check_generation_options(options: dict[str, Any], defaults: GenerationConfig) -> None:
    """Refuse options that would give silently wrong text.

    Args:
        options: Keyword arguments meant for transformers' `generate`; a `generation_config` in them counts too.
        defaults: The model's own generation config, in force where neither says anything.

    Raises:
        ValueError: Names the option, its value and the reason.
    """
    config = options.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise ValueError(f"generation_config must be a transformers GenerationConfig; got {type(config).__name__}")

    def value(name: str) -> Any:
        return option_value(name, options, defaults)

    # The model's own default does not count: configs saved after training often carry it.
    if options.get("use_cache") is False or getattr(config, "use_cache", None) is False:
        raise ValueError("use_cache=False cannot be used: the route of a prompt lives in its KV cache; drop the option")
    if options.get("inputs_embeds") is not None and value("prefill_chunk_size") is not None:
        raise ValueError(
            f"prefill_chunk_size={value('prefill_chunk_size')} cannot be used with inputs_embeds: transformers cuts "
            "only input_ids into chunks; drop one of them"
        )
    for name, (off, reason) in _UNSUPPORTED.items():
        given = value(name)
        if given not in off:
            shown = type(given).__name__ if isinstance(given, nn.Module) else repr(given)
            raise ValueError(f"{name}={shown} cannot be used with routed decoding: {reason}; drop the option")


#: Settings of a generation config that change the scores of tokens, and the values that mean "off".
_SCORE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
}
#: The same, in force where tokens are drawn.
_SAMPLING_SETTINGS: dict[str, tuple[Any, ...]] = {
    "min_p": (None, 0, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_score_settings(defaults: GenerationConfig, drawn: bool = False) -> None:
    """Raises ValueError if the model's own generation config changes scores, which the decode engine does not.

    Args:
        defaults: The config. Within `pinned_generation` it holds special tokens alone.
        drawn: Whether tokens are drawn.
    """
    for name, off in (_SCORE_SETTINGS | (_SAMPLING_SETTINGS if drawn else {})).items():
        given = getattr(defaults, name, None)
        if given not in off:
            raise ValueError(
                f"the model's generation config has {name}={given!r}, which the decode engine does not follow: set "
                f"lm.generation_config.{name} = None, or decode with RouterAugmentedLM.generate"
            )


@contextmanager
def pinned_generation(lm: Any) -> Iterator[None]:
    """Within it, `generate` and the decode engine follow what they are given and nothing that the model's folder says.

    The model's generation config is put aside but for its special tokens, so that no penalty, cut-off or search of it
    moves a score.
    """
    own = lm.generation_config
    lm.generation_config = GenerationConfig(**{name: getattr(own, name) for name in _SPECIAL_TOKENS})
    try:
        yield
    finally:
        lm.generation_config = own


def stop_tokens(lm: Any, tokenizer: Any) -> list[int]:
    """Every token that ends a response: those of the model's generation config and the tokenizer's EOS, sorted."""
    found: set[int] = set()
    for given in (lm.generation_config.eos_token_id, getattr(tokenizer, "eos_token_id", None)):
        found |= {given} if isinstance(given, int) else set(given or ())
    return sorted(found)
