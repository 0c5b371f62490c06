"""A tiny random model with its tokenizer on disk, and small runs of the whole pipeline on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from firstlab.config.compose import conf_dir, register
from firstlab.config.schema import ExperimentConfig
from firstlab.methods.base import Method
from firstlab.run.load import load
from support.texts import tiny_tokenizer

SMALL = [
    "model=hf",
    "model.name=tiny",
    "model.dtype=float32",
    "data.train_size=48",
    "data.val_size=8",
    "data.max_length_router=256",
    "data.max_length_lora=256",
    "data.max_prompt_length=192",
    "data.max_new_tokens=6",
    "method.calibration_prompts=4",
    "router_phase.batch_size=4",
    "router_phase.max_steps=6",
    "router_phase.validate_every=2",
    "router_phase.checkpoint_every=1",
    "lora_phase.batch_size=4",
    "lora_phase.max_steps=4",
    "lora_phase.validate_every=2",
    "lora_phase.checkpoint_every=1",
    "lora.dropout=0",
    "evaluation.limit=7",
    "evaluation.batch_size=4",
    "evaluation.resamples=100",
    "evaluation.tpot_prompts=1",
    "evaluation.tpot_tokens=3",
    "evaluation.tpot_repetitions=1",
    "trainer.progress_bar=false",
    "phases=[router,lora,evaluate]",
]


def save_tiny_model(directory: Path, num_layers: int = 4) -> Path:
    """A random Llama of `num_layers` layers and a byte-level tokenizer."""
    tokenizer = tiny_tokenizer(pad=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def overrides(model: Path, runs: Path, *extra: str) -> list[str]:
    """Command line of a small run."""
    return [*SMALL, f"model.path={model}", f"runs={runs}", *extra]


def composed(*arguments: str) -> tuple[ExperimentConfig, Method]:
    """What `python -m firstlab.train ARGUMENTS` would run."""
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return load(compose("train", list(arguments)))


@contextmanager
def started_with(*arguments: str) -> Iterator[None]:
    """Inside a command of Hydra's that was given these overrides."""
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        HydraConfig.instance().set_config(compose("train", list(arguments), return_hydra_config=True))
    try:
        yield
    finally:
        HydraConfig.instance().cfg = None


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as dotted keys."""
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        return {prefix: node}
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}").items()}
