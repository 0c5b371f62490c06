"""Tiny random-weight models of every tested architecture."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.route_router import RouteRouter
from firstlab.model.settings import RouterSettings

LAYERS = 6
HIDDEN = 32

_SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {
    "n_embd": 32,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _SMALL,
    "mistral": {**_SMALL, "sliding_window": 8},
    "qwen2": _SMALL,
    "qwen3": {**_SMALL, "head_dim": 8},
    "gemma": {**_SMALL, "head_dim": 8},
    "gemma2": {**_SMALL, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {**_SMALL, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi3": _SMALL,
    "gpt2": _GPT,
    "gpt_neox": {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"},
    "opt": {**_SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {**_SMALL, "n_layer": 6, "n_head": 4},
    "gptj": {**_GPT, "rotary_dim": 4},
    "mixtral": {**_SMALL, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_oss": {**_SMALL, "head_dim": 8, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {k: v for k, v in _SMALL.items() if k != "num_key_value_heads"},
    "olmo2": _SMALL,
    "cohere2": {**_SMALL, "sliding_window": 8},
}


def tiny_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A seeded random model of the architecture, in eval mode, with weights large enough to disagree about tokens."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(4.0)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model


def random_routers(model: RouterAugmentedLM, seed: int = 1) -> None:
    """Random routers whose logits have mean 0 and spread 2 over random prompts, so that routes differ by prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (16, 10), generator=generator)
    with torch.no_grad():
        hidden = model.lm(ids, output_hidden_states=True, use_cache=False).hidden_states
        for weight, states in zip(model.routers.weight, hidden[:-1], strict=True):
            mean = states.mean((0, 1))
            direction = torch.randn(weight.shape, generator=generator)
            direction -= (direction @ mean) / (mean @ mean) * mean
            weight.copy_(2 * direction / (states @ direction).std())


@cache
def pair(architecture: str) -> tuple[PreTrainedModel, RouterAugmentedLM]:
    """(untouched base, wrapped copy of it), shared by tests that change neither."""
    base = tiny_model(architecture)
    model = RouterAugmentedLM(deepcopy(base))
    random_routers(model)
    return base, model


def routed_model(architecture: str = "llama") -> RouterAugmentedLM:
    """A fresh wrapped tiny model whose routers skip some layers for some prompts."""
    model = RouterAugmentedLM(tiny_model(architecture))
    model.routers.load_state_dict(pair(architecture)[1].routers.state_dict())
    return model


def random_lora(model: RouterAugmentedLM, std: float = 0.05) -> None:
    """Let LoRA, which starts without effect, change something."""
    for name, parameter in model.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def with_logits(model: Any, ids: Tensor, mask: Tensor | None, **options: Any) -> tuple[Tensor, Tensor, Any]:
    """What `generate` gives, greedily unless the options say otherwise: sequences, logits [B, new, V] and cache."""
    options = {"do_sample": False, "max_new_tokens": 7} | options
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences, torch.stack(out.logits, dim=1), out.past_key_values


def prompts(lengths: tuple[int, ...] = (5, 9, 12), side: str = "left", seed: int = 3) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded with 0 on one side: (ids, mask)."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(3, 97, (length,), generator=generator)
        mask[row, where] = 1
    return ids, mask


def random_routes(rows: int, seed: int = 5) -> Tensor:
    """Random routes [rows, LAYERS], each skipping something, different from one another; layer 0 skipped in row 0."""
    generator = torch.Generator().manual_seed(seed)
    routes = torch.rand(rows, LAYERS, generator=generator) > 0.4
    routes[0, 0] = False
    routes[torch.arange(rows), torch.arange(rows) % LAYERS] = False
    return routes


def logits(model: RouterAugmentedLM) -> torch.Tensor:
    ids, mask = prompts(side="right")
    with torch.no_grad():
        return model(ids, mask).logits


def batch(side: str = "right"):
    """Sequences whose response is the part after 5, 6 and 7 prompt tokens: (ids, mask, labels, prompt_mask)."""
    ids, mask = prompts((8, 10, 12), side)
    starts = mask.argmax(1)
    place = torch.arange(ids.shape[1]) - starts[:, None]
    prompt_mask = mask.bool() & (place < torch.tensor([[5], [6], [7]]))
    labels = ids.masked_fill(prompt_mask | ~mask.bool(), -100)
    return ids, mask, labels, prompt_mask


#: Skipped layers of the routes in the codebook of `routed`.
SETS = [(), (3,), (2, 3), (2, 4), (1, 2, 4)]


def filled(router: RouteRouter, seed: int = 0) -> None:
    """A fit that makes prompts choose differently."""
    torch.manual_seed(seed)
    features = router.harm_weight.shape[1]
    codebook = torch.ones(len(SETS), LAYERS)
    for place, skipped in enumerate(SETS):
        codebook[place, list(skipped)] = 0
    router.set_fit(
        codebook=codebook,
        harm_weight=0.3 * torch.randn(len(SETS), features),
        harm_bias=torch.tensor([0, 0.05, 0.1, 0.1, 0.2]),
        length_weight=0.2 * torch.randn(features),
        length_bias=torch.tensor(1.0),
        rates=torch.tensor([0, 0.1, 0.3, 0.5]),
        prices=torch.tensor([0, 0.05, 0.2, 1.0]),
        default_rate=torch.tensor(0.25),
    )


def routed(architecture: str = "llama", **options) -> RouterAugmentedLM:
    """With a `RouteRouter` whose made-up fit lets prompts choose differently."""
    lm, _ = pair(architecture)
    model = RouterAugmentedLM(deepcopy(lm), RouterSettings(kind="routes", **{"price": "length", **options})).eval()
    filled(model.routers)
    return model
