"""A training phase on the tiny model, small enough to be run many times."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from firstlab.config.build import build_data, load_model
from firstlab.config.schema import ExperimentConfig, PhaseConfig, TrainerConfig
from firstlab.data.datamodule import PromptDataModule
from firstlab.methods.objective import RoutingObjective
from firstlab.model.settings import LoraSettings
from firstlab.training.modules import LoRACompensationModule, OnePhaseModule, Phase, RouterModule
from firstlab.training.trainer import fit_phase
from support.tiny_run import composed, overrides

STEPS = 6
PHASES = {"router": RouterModule, "lora": LoRACompensationModule, "one": OnePhaseModule}
TARGET = RoutingObjective(
    objective="decode_consistent",
    gate="bernoulli",
    pooled_tokens="prompt",
    multiplier=0.1,
    target_skip=0.3,
    dual_rate=0.5,
)


@cache
def _prepared(model_dir: Path) -> tuple[ExperimentConfig, PromptDataModule]:
    """Read once; data that starts over is as good as new."""
    config, _ = composed(*overrides(model_dir, model_dir))
    return config, build_data(config)


class TinyPhase:
    """A model, data of `STEPS` steps and one phase of training."""

    def __init__(self, model_dir: Path) -> None:
        self.directory = model_dir
        config, self.data = _prepared(model_dir)
        self.data.consumed_batches = 0
        self.data.batch_size, self.data.loss_on, self.data.total_batches = 4, "response", 2 * STEPS
        torch.manual_seed(0)  # of the routers
        self.model = load_model(config, model_dir)

    def module(self, name: str, objective: RoutingObjective, **phase: Any) -> Phase:
        """One of `PHASES`, with settings of its `PhaseConfig`."""
        if name != "router":
            torch.manual_seed(0)
            self.model.add_lora(LoraSettings(rank=2, dropout=0.1))
        given = {"learning_rate": 0.01, "warmup_fraction": 0.1, "accumulate": 2, "patience": None}
        given |= {"validate_every": 2, "checkpoint_every": 1}
        return PHASES[name](self.model, objective=objective, phase=PhaseConfig(**{**given, **phase}), seed=3)

    def fit(self, module: Phase, directory: Path, loggers: Any = (), **trainer: Any) -> dict[str, Any]:
        """Train it, or go on with it, with settings of its `TrainerConfig`."""
        self.data.total_batches = STEPS * module.phase.accumulate
        config = TrainerConfig(progress_bar=False, **trainer)
        given = {"directory": directory, "loggers": list(loggers), "resume": True}
        return fit_phase(module, self.data, config=config, max_steps=STEPS, **given)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
