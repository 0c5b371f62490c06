"""Two processes that share a frozen base: the same training as with a base each, in checkpoints without shards."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from firstlab.model.lm import RouterAugmentedLM
from firstlab.run.launch import torchrun
from firstlab.training.trainer import read_checkpoint
from support import sharded_fit
from support.tiny_phase import TinyPhase


@pytest.fixture(scope="module")
def fitted(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME/STRATEGY of two phases, each with and without shards."""
    directory = tmp_path_factory.mktemp("sharded")
    tests = Path(sharded_fit.__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    command = [*torchrun(2), sharded_fit.__file__, str(tiny_model_dir), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


def found(fitted: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    whole, sharded = (json.loads((fitted / name / each / "found.json").read_text()) for each in ("ddp", "fsdp"))
    return whole, sharded


@pytest.mark.parametrize("name", ["lora", "router"])
def test_a_sharded_base_changes_no_number(fitted: Path, name: str):
    whole, sharded = found(fitted, name)
    for what in ("log", "kept", "rho"):
        assert sharded[what] == whole[what], what
    assert any("train/loss" in row for row in whole["log"]) and any("val/score" in row for row in whole["log"])
    ours, theirs = (read_checkpoint(fitted / name / each / "last.ckpt") for each in ("fsdp", "ddp"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key


def test_the_frozen_decoder_is_shared_in_its_own_type(fitted: Path):
    (_, lora), (whole, router) = found(fitted, "lora"), found(fitted, "router")
    assert not any("lora_" in name or "routers" in name for name in [*lora["sharded"], *router["sharded"]])
    assert {"model.lm.model.layers.0.mlp.up_proj.weight", "model.lm.model.embed_tokens.weight"} < set(router["sharded"])
    assert router["types"] == ["torch.bfloat16"] and lora["types"] == ["torch.float32"]
    assert router["local"] < 0.8 * whole["local"]


def test_what_a_sharded_phase_leaves_needs_no_shards(fitted: Path, tiny_model_dir: Path):
    folder = fitted / "lora" / "fsdp"
    saved = RouterAugmentedLM.from_pretrained(folder / "saved", base=tiny_model_dir)
    assert saved.has_lora
    last = read_checkpoint(folder / "last.ckpt")
    tiny = TinyPhase(tiny_model_dir)
    module = tiny.module("lora", sharded_fit.OBJECTIVE, gradient_clip=sharded_fit.CLIP)
    kept = tiny.fit(module, folder)  # goes on from there, in one process
    assert module.multiplier == last["multiplier"]
    assert kept["val/score"] == pytest.approx(found(fitted, "lora")[1]["kept"]["val/score"], rel=1e-4)
