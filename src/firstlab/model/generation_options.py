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

# Reason -> options that it rules out, with the value, beside None, that means "off". transformers reads "hybrid", of
# older configs, as "dynamic".
_UNSUPPORTED: dict[str, dict[str, Any]] = {
    "it drafts tokens inside the prompt pass, before a route exists": {
        **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type")),
        "use_mtp": False,
    },
    "a draft model's cache is rewound into the prompt pass": {"is_assistant": False},
    "contrastive search rewinds the cache that carries the routes": {"penalty_alpha": 0},
    "DoLa compares layers that a route may skip": {"dola_layers": None},
    "it runs code from the hub that may replace the cache": {
        "num_beam_groups": 1,
        **dict.fromkeys(("constraints", "force_words_ids", "custom_generate")),
    },
    "it tokenizes the prompt again, so that padding and prompt length may change": {"token_healing": False},
    "the routes live in the model's own dynamic cache": {"cache_implementation": "hybrid", "cache_config": None},
    "its second, unconditional pass would run unrouted": {"guidance_scale": 1},
}


def option_value(name: str, options: dict[str, Any], defaults: GenerationConfig) -> Any:
    """The value in force: the keyword, else that of `generation_config`, else the model's own."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(defaults, name, None) if given is None else given


def check_generation_options(options: dict[str, Any], defaults: GenerationConfig) -> None:
    """Raises ValueError for keywords of transformers' `generate` that would give silently wrong text.

    `defaults` is the model's own generation config, in force where neither they nor a `generation_config` say anything.
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
    for reason, names in _UNSUPPORTED.items():
        for name, off in names.items():
            given = value(name)
            if given not in (None, off):
                shown = type(given).__name__ if isinstance(given, nn.Module) else repr(given)
                raise ValueError(f"{name}={shown} cannot be used with routed decoding: {reason}; drop the option")


# Settings of a generation config that change the scores of tokens, and the value, beside None, that means "off".
_SCORE_SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens"), 0),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), []),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id")),
    **dict.fromkeys(("exponential_decay_length_penalty", "watermarking_config")),
}
# The same, in force where tokens are drawn.
_SAMPLING_SETTINGS = {"min_p": 0, "top_h": None, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_score_settings(defaults: GenerationConfig, drawn: bool = False) -> None:
    """Raises ValueError if the model's own generation config changes scores, which the decode engine does not."""
    for name, off in (_SCORE_SETTINGS | (_SAMPLING_SETTINGS if drawn else {})).items():
        given = getattr(defaults, name, None)
        if given not in (None, off):
            raise ValueError(
                f"the model's generation config has {name}={given!r}, which the decode engine does not follow: set "
                f"lm.generation_config.{name} = None, or decode with RouterAugmentedLM.generate"
            )


@contextmanager
def pinned_generation(lm: Any) -> Iterator[None]:
    """Put aside the model's generation config, but for its special tokens: no penalty or search of it moves a score."""
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
