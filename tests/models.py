"""Tiny random-weight models of every tested architecture."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
_GPT = {"n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 128, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}

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
