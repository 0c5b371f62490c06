"""Put the record of a run together, for training and `firstlab.evaluate` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from firstlab.config.schema import ExperimentConfig
from firstlab.methods.base import Method
from firstlab.model.lm import RouterAugmentedLM
from firstlab.run.phases import PHASES, phase_record
from firstlab.store import machine


def record_of(
    run: Path, out: Path, config: ExperimentConfig, method: Method, model: RouterAugmentedLM, **more: Any
) -> dict[str, Any]:
    """What the result.json in `out` says of the run in directory `run`; `more` holds its variants and the like."""
    return {
        "method": method.name,
        "label": method.label,
        "level": method.level,
        "rounding": method.rounding(model.num_layers),
        "note": config.note,
        "model": config.model.name,
        "data": config.data.name,
        "directory": str(out),
        "config_hash": config.hash(),
        "config": config.identity(),
        "seed": config.seed,
        "num_layers": model.num_layers,
        "phases": {phase: phase_record(run, phase) for phase in PHASES},
        **more,
        **machine.provenance(model.device),
    }
