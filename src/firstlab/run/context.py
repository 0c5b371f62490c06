"""What the steps of a run share: its prompts, its routes, the evaluation of a variant, its record."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import Logger

from firstlab.config.command_line import during
from firstlab.config.schema import TRAINED, ExperimentConfig, PhaseConfig
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.task import Example
from firstlab.evaluation.variant import evaluate_variant
from firstlab.methods.base import Method
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import Routes
from firstlab.run.decisions import prompt_routes, shared_routes, static_routes
from firstlab.run.directory import phase_record
from firstlab.store import machine
from firstlab.store.ranks import rank
from firstlab.training.prompt_set import PromptSet


@dataclass(repr=False, eq=False)
class Run:
    """What is run and where, its prompts, and the model as the last step has left it."""

    config: ExperimentConfig
    method: Method
    directory: Path
    data: PromptDataModule
    model: RouterAugmentedLM
    loggers: list[Logger] = field(default_factory=list)

    @property
    def tuned(self) -> bool:
        """Whether the run chooses on a model that was tuned first."""
        return (self.directory / "tune").is_dir()

    def prompts(self, examples: Sequence[Example]) -> PromptSet:
        """Prompts for the method to look at."""
        trainer, device = self.config.trainer, self.model.device
        room = trainer.prompt_cache_mib * 2**20
        if device.type == "cuda":
            room = min(room, torch.cuda.mem_get_info(device)[0] // 2)
        shown = trainer.progress_bar and rank()[0] == 0
        batch_size, at_once = self.config.evaluation.batch_size, self.config.read_batch_size
        return PromptSet(self.model, self.data, examples, batch_size, room, shown, at_once)

    def routes(self, examples: Sequence[Example]) -> Routes | None:
        """The method's decision: [L] for all prompts, [N, L] for these, or None where the routers decide."""
        with self.reading("the decision of routes"):
            if not self.method.per_prompt:
                return shared_routes(self.directory, self.method, self.prompts(self.data.train))
            return prompt_routes(self.directory, self.method, self.prompts(examples))

    def evaluate(self, variant: str, routes: Routes | None, source: str, out: Path) -> dict[str, Any]:
        """What a record says of the model as it is now, which is this variant; `out` gets its predictions."""
        with self.reading(f"the evaluation of {variant}"):
            return evaluate_variant(
                self.model,
                self.data,
                self.config.evaluated(),
                out,
                variant,
                routes=routes,
                source=source,
                seed=self.config.seed,
                progress_bar=self.config.trainer.progress_bar,
                static=static_routes(self.directory, self.method, self.model.num_layers),
            )

    def record(self, out: Path, **more: Any) -> dict[str, Any]:
        """What the result.json in `out` says; `more` holds the variants and the like."""
        config, method, layers = self.config, self.method, self.model.num_layers
        return {
            "method": method.name,
            "label": method.label,
            "level": method.level,
            "rounding": method.rounding(layers),
            "note": config.note,
            "model": config.model.name,
            "data": config.data.name,
            "directory": str(out),
            "config_hash": config.hash(),
            "config": config.identity(),
            "seed": config.seed,
            "num_layers": layers,
            "phases": {phase: phase_record(self.directory, phase) for phase in TRAINED},
            **more,
            **machine.provenance(self.model.device),
        }

    def settings(self, phase: str) -> PhaseConfig:
        """Those of a training phase."""
        return self.config.router_phase if phase == "router" else self.config.lora_phase

    def reading(self, step: str) -> AbstractContextManager[None]:
        """A step that reads prompts in batches, to be named where memory runs out."""
        larger = self.config.trainer.read_batch_size
        option = f"evaluation.batch_size={self.config.evaluation.batch_size}"
        return during(f"{step} with {option if larger is None else f'trainer.read_batch_size={larger}'}")


def say(message: str) -> None:
    """Print a line, once for all processes."""
    if rank()[0] == 0:
        print(message, flush=True)
