"""Settings of the tables; conf/tables.yaml and conf/scale fill them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from firstlab.config.compose import settings
from firstlab.config.grid import ScaleConfig


@dataclass
class TablesConfig:
    """What `python -m firstlab.tables` takes.

    Attributes:
        scale: See `ScaleConfig`.
        results: Folders that are searched for result files.
        out: Folder that the tables are written to.
        tolerance: How far a run's measured skip rate may lie from a level and still stand for it.
        rate_gap: How far the measured skip rates of two runs may lie apart for a test between them to count fully; a
            mark that the larger gap may explain stands in parentheses.
        significance: Level of the paired tests.
        confidence: Coverage of intervals computed here.
        resamples: Draws per interval and per test.
        reference: Method that the others are tested against, at the same level and with the same LoRA.
        ablation_level: Paper's level (percent) of the ablations.
    """

    scale: ScaleConfig = field(default_factory=ScaleConfig)
    results: list[str] = field(default_factory=list)
    out: str = MISSING
    tolerance: float = 0.035
    rate_gap: float = 0.02
    significance: float = 0.05
    confidence: float = 0.95
    resamples: int = 1000
    reference: str = "first"
    ablation_level: int = 15

    def check(self) -> None:
        """Raises ValueError with the option's name."""
        self.scale.check()
        for key in ("tolerance", "rate_gap", "significance", "confidence"):
            if not 0 < getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} is not allowed: strictly between 0 and 1")
        if self.resamples < 100:
            raise ValueError(f"resamples={self.resamples} is not allowed: at least 100")
        if not self.results:
            raise ValueError("results=[] is not allowed: name at least one folder, e.g. results=[experiments]")
        if self.reference not in self.scale.methods:
            known = ", ".join(self.scale.methods)
            raise ValueError(f"reference={self.reference!r} is not a method of the scale: choose one of {known}")
        if self.ablation_level not in self.scale.levels:
            raise ValueError(
                f"ablation_level={self.ablation_level} is not one of scale.levels {list(self.scale.levels)}"
            )


def register() -> None:
    """Tell Hydra the schema that conf/tables.yaml starts from."""
    ConfigStore.instance().store(name="tables_schema", node=TablesConfig)


def load(config: DictConfig) -> TablesConfig:
    """The checked settings.

    Raises:
        ValueError: One message with the option, its value and what is allowed.
    """
    checked = settings(config, TablesConfig)
    checked.check()
    return checked
