"""Settings of the tables; conf/tables.yaml and conf/scale fill them."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING, DictConfig

from firstlab.config.compose import settings, store_schema
from firstlab.config.grid import ScaleConfig
from firstlab.config.schema import check_options, option


@dataclass
class TablesConfig:
    """What `python -m firstlab.tables` takes."""

    scale: ScaleConfig = field(default_factory=ScaleConfig)
    results: list[str] = field(default_factory=list)  # folders that are searched for result files
    out: str = MISSING
    # How far a run's measured skip rate may lie from a level and still stand for it.
    tolerance: float = option(0.04, above=0, below=1)
    # How far the rates of two runs may lie apart; a mark that a larger gap may explain stands in parentheses.
    rate_gap: float = option(0.02, above=0, below=1)
    significance: float = option(0.05, above=0, below=1)  # level of the paired tests
    confidence: float = option(0.95, above=0, below=1)  # coverage of intervals computed here
    resamples: int = option(1000, least=100)  # draws per interval and per test
    reference: str = "first"  # method that the others are tested against, at the same level and with the same LoRA
    ablation_level: int = 15  # the paper's level (percent) of the ablations, whose rows stand in conf/scale

    def __post_init__(self) -> None:
        self.scale.check()
        check_options(self)
        if not self.results:
            raise ValueError("results=[] is not allowed: name at least one folder, e.g. results=[experiments]")
        if self.reference not in self.scale.methods:
            known = ", ".join(self.scale.methods)
            raise ValueError(f"reference={self.reference!r} is not a method of the scale: choose one of {known}")
        if self.ablation_level not in self.scale.levels:
            known = ", ".join(map(str, self.scale.levels))
            raise ValueError(f"ablation_level={self.ablation_level} is not one of scale.levels: {known}")


store_schema("tables_schema", TablesConfig)


def load(config: DictConfig) -> TablesConfig:
    """The settings. Raises ValueError with the option, its value and what is allowed."""
    return settings(config, TablesConfig)
