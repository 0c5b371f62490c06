"""Run by torchrun in two processes: one phase of training with each strategy, and how the base was sharded."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.loggers.logger import DummyLogger
from torch.distributed.tensor import DTensor

from firstlab.training.prompt_set import PromptSet
from support.tiny_phase import TARGET, TinyPhase

OBJECTIVE = replace(TARGET, hold_routes=10.0)
#: Low enough that every step is clipped.
CLIP = 0.01


class Steps(DummyLogger):
    """Keeps everything that is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)


def fit(model_dir: Path, directory: Path, name: str, strategy: str, dtype: torch.dtype) -> None:
    tiny, log = TinyPhase(model_dir), Steps()
    tiny.model.to(dtype)
    module = tiny.module(name, OBJECTIVE, gradient_clip=CLIP)
    kept = tiny.fit(module, directory, [log], strategy=strategy, devices=2)
    weights = {name: value.dtype for name, value in module.named_parameters() if isinstance(value, DTensor)}
    local = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in module.parameters())
    found = {
        "kept": kept,
        "rho": PromptSet(tiny.model, tiny.data, tiny.data.val, 4).rho().tolist(),
        "log": log.rows,
        "sharded": sorted(weights),
        "types": sorted({str(each) for each in weights.values()}),
        "local": local,
    }
    if dist.get_rank() == 0:
        tiny.model.save_pretrained(directory / "saved")
        (directory / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.filterwarnings("error", message="It is recommended to use")
    model_dir, directory = Path(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo")
    for name, dtype in (("lora", torch.float32), ("router", torch.bfloat16)):
        for strategy in ("ddp", "fsdp"):
            fit(model_dir, directory / name / strategy, name, strategy, dtype)
    dist.destroy_process_group()
