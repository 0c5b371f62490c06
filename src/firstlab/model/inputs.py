"""Check what `RouterAugmentedLM` is given, by name, and complete what is left out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from firstlab.model.cache import RoutedCache
from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers
from firstlab.model.routes import Routes

#: Tokens that may come at once behind a decided route without a warning.
FEW_TOKENS = 32


def check_not_wrapped(lm: Any) -> None:
    """Raises ValueError for a model that somebody's wrapper, ours or PEFT's, stands around."""
    if isinstance(getattr(lm, "routers", None), Routers | RouteRouter):
        raise ValueError("the model is wrapped already: use it as it is, or wrap model.unwrap()")
    if isinstance(lm, PeftModel):
        raise ValueError(
            f"{type(lm).__name__} is PEFT's wrapper: pass peft_model.merge_and_unload(), which has the adapter in its "
            "weights, or the plain model"
        )


def check_forward(
    decoder: nn.Module,
    tokens: Tensor,
    labels: Tensor | None,
    routes: Routes | Tensor | None,
    keep_logits: bool,
    cached: bool,
    options: dict[str, Any],
) -> None:
    """Raises ValueError for arguments of `forward` that do not go together.

    `tokens` are ids [B, T] or embeddings [B, T, D]; of the other `options`, those that repeat a default are taken out.
    """
    if not keep_logits and labels is None:
        raise ValueError("keep_logits=False leaves nothing to return without labels=; pass labels, or keep logits")
    if not keep_logits and options.get("output_hidden_states"):
        raise ValueError("output_hidden_states=True needs the whole output; drop it, or keep_logits=False")
    if labels is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(f"labels must be {list(tokens.shape[:2])} like the tokens; got {list(labels.shape)}")
    if labels is not None and options.get("logits_to_keep"):
        raise ValueError("logits_to_keep leaves out logits that labels= needs; drop one (or use keep_logits=False)")
    if options.pop("return_dict", None) is False:
        raise ValueError("return_dict=False cannot be used: rho and the loss terms have names alone; drop it")
    use_cache = options.pop("use_cache", None)
    if use_cache is not None and use_cache != cached:
        way_out = "drop past_key_values" if cached else "pass past_key_values=model.new_cache()"
        raise ValueError(f"use_cache={use_cache} contradicts past_key_values, which decides; {way_out}")
    # The decoder and its layers, which know of it; to go through all modules takes milliseconds.
    inside = (each for child in decoder.children() for each in child.children())
    if any(getattr(each, "gradient_checkpointing", False) for each in (decoder, *inside)):
        raise ValueError(
            "the gradient checkpointing of transformers would recompute layers without their routes: call "
            "lm.gradient_checkpointing_disable() and set model.gradient_checkpointing = True instead"
        )
    if cached and (labels is not None or routes is not None):
        raise ValueError(
            "labels= and routes= belong to a teacher-forced pass: drop past_key_values, or force the routes "
            "with new_cache(routes=...)"
        )


def check_mask(prompt: Tensor, attention_mask: Tensor) -> None:
    """Raises ValueError unless the mask is [B, T] like the prompt, ids [B, T] or embeddings [B, T, D]."""
    if attention_mask.ndim != 2 or attention_mask.shape != prompt.shape[:2]:
        raise ValueError(
            f"attention_mask must be [batch, tokens] like the prompt {list(prompt.shape[:2])}; "
            f"got {list(attention_mask.shape)}"
        )


def check_prompt(prompt: Tensor, attention_mask: Tensor) -> None:
    """Raises ValueError as `check_mask`, and for a row without tokens, whose rho would be a mean of nothing."""
    check_mask(prompt, attention_mask)
    if not attention_mask.any(dim=1).all():
        raise ValueError("a prompt has no tokens; give every row at least one (for instance the BOS token)")


def own_cache(cache: Any) -> RoutedCache:
    """The cache, if it can carry routes; raises ValueError for any other."""
    if not isinstance(cache, RoutedCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; routes live in the cache, so pass one from "
            "model.new_cache() or from an earlier generate(..., return_dict_in_generate=True)"
        )
    return cache


def check_continuation(cache: RoutedCache, tokens: int, generating: bool) -> None:
    """Warn where tokens that may belong to the prompt come behind a route that is decided.

    Skipping is right for a response or a short follow-up. More than `FEW_TOKENS` at once are taken for a prompt, and in
    `generate` several before any decode step (a cached system prompt).
    """
    if cache.decided and (tokens > FEW_TOKENS or (generating and tokens > 1 and not cache.has_decoded)):
        warnings.warn(
            f"{tokens} tokens come at once behind a route that past_key_values has decided already: they run with "
            "skipped layers. If they belong to the prompt, read what is cached with prompt_continues=True, so that "
            "the route is decided on the whole prompt",
            stacklevel=3,
        )


def check_new_tokens(prompt: Tensor, attention_mask: Tensor | None, cache: RoutedCache) -> None:
    """Raises ValueError for what `generate` cannot put behind a cache; see `check_continuation` for its warning."""
    new = prompt.shape[1] - cache.get_seq_length()
    if prompt.ndim == 2:
        if new < 1:
            raise ValueError(
                f"past_key_values holds {cache.get_seq_length()} tokens and input_ids has {prompt.shape[1]}: give the "
                "whole text, with one new token at least"
            )
        check_continuation(cache, new, generating=True)
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("the new tokens after past_key_values are padded on the right; pad them on the left")


def padded_on_the_left(
    attention_mask: Tensor, input_ids: Tensor | None, embeds: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mask [B, T], ids [B, T] and embeddings [B, T, D] with padding on the right moved to the left."""
    if attention_mask[:, -1].all():
        return attention_mask, input_ids, embeds
    order = attention_mask.long().argsort(dim=1, stable=True)
    if input_ids is not None and input_ids.shape == order.shape:
        input_ids = input_ids.gather(1, order)
    if embeds is not None:
        embeds = embeds.gather(1, order.unsqueeze(-1).expand_as(embeds))
    return attention_mask.gather(1, order), input_ids, embeds


def assumed_mask(prompt: Tensor, pad: Any, eos: Any) -> Tensor:
    """The mask [B, T] that transformers' generate assumes where none is given: padding is what is not the EOS token.

    As there, a batch whose padding cannot be told from its EOS token gets a warning.
    """
    mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
    ends = eos if isinstance(eos, list) else [eos]
    if pad is not None and pad not in ends:
        padded = (prompt != pad).long() if prompt.ndim == 2 else mask
        return padded if padded.any(dim=1).all() else mask
    if eos is not None and len(prompt) > 1:
        warnings.warn(
            "a batch has no attention_mask, and padding cannot be told from the EOS token: rows that are padded get "
            "other routes and other text; pass the attention_mask of the tokenizer",
            stacklevel=3,
        )
    return mask


def warn_of_padding(prompt: Tensor, pad: Any) -> None:
    """Warn as transformers' models do: no mask was given, and a row begins or ends with the padding token."""
    if prompt.ndim == 2 and pad is not None and (prompt[:, [-1, 0]] == pad).any():
        warnings.warn(
            f"input_ids begin or end with the padding token {pad} and have no attention_mask: every token counts; "
            "pass the attention_mask of the tokenizer",
            stacklevel=3,
        )
