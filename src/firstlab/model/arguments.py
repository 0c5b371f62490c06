"""What `RouterAugmentedLM` is given: refused by name where it does not fit, completed where something is left out.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from firstlab.model.cache import RoutedCache
from firstlab.model.routers import Routers
from firstlab.model.routes import Routes


def check_not_wrapped(lm: Any) -> None:
    """Raises ValueError for a model that somebody's wrapper, ours or PEFT's, stands around."""
    if isinstance(getattr(lm, "routers", None), Routers):
        raise ValueError("the model is wrapped already: use it as it is, or wrap model.unwrap()")
    if isinstance(lm, PeftModel):
        raise ValueError(
            f"{type(lm).__name__} is PEFT's wrapper: pass peft_model.merge_and_unload(), which has the adapter in its "
            "weights, or the plain model"
        )


def check_forward(
    lm: nn.Module,
    tokens: Tensor,
    labels: Tensor | None,
    routes: Routes | None,
    keep_logits: bool,
    cached: bool,
    options: dict[str, Any],
) -> None:
    """Refuse arguments of `forward` that do not go together.

    Args:
        lm: The wrapped model.
        tokens: [B, T] ids or [B, T, D] embeddings.
        labels, routes, keep_logits: As of `forward`.
        cached: Whether there is a cache.
        options: The other arguments; what says nothing new is taken out.

    Raises:
        ValueError: Names the argument and the way out.
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
    if any(getattr(each, "gradient_checkpointing", False) for each in lm.modules()):
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


def check_rows(routes: Routes | None, rows: int) -> None:
    """Raises ValueError for forced routes [R, L] with another number of rows than there are prompts."""
    if isinstance(routes, Tensor) and routes.ndim == 2 and routes.shape[0] != rows:
        raise ValueError(f"routes has {routes.shape[0]} rows for {rows} prompts; give one row per prompt")


def own_cache(cache: Any) -> RoutedCache:
    """The cache, if it can carry routes; raises ValueError for any other."""
    if not isinstance(cache, RoutedCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; routes live in the cache, so pass one from "
            "model.new_cache() or from an earlier generate(..., return_dict_in_generate=True)"
        )
    return cache


def assumed_mask(prompt: Tensor, pad_token_id: Any, eos: Any) -> Tensor:
    """The mask [B, T] that transformers' generate assumes where none is given: padding is what is not the EOS token."""
    mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
    if prompt.ndim != 2 or pad_token_id is None or pad_token_id in (eos if isinstance(eos, list) else [eos]):
        return mask
    padded = (prompt != pad_token_id).long()
    return padded if padded.any(dim=1).all() else mask
