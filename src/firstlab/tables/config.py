"""Settings of the tables; `conf/tables.yaml` and `conf/scale/` fill them."""

from __future__ import annotations

from dataclasses import dataclass, field

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig

from firstlab.config.compose import settings
from firstlab.store import paper


@dataclass
class ScaleConfig:
    """What stands for the paper's models, tasks and levels; tables of those that it lacks are left out.

    Attributes:
        name: The file's; also the folder of its tables.
        base: Overrides that every run of the scale starts with.
        models: Paper's model to ours (conf/model).
        tasks: Paper's task to ours (conf/data).
        levels: Paper's skip level in percent to the skip rate that we ask for.
        alphas: Paper's skip level in percent to α, for methods that take α.
        methods: Overrides per method; {level} and {alpha} are filled in.
        ablation_model: Which of the paper's models the ablations are made with, on the first task; null for none.
        all_steps: Overrides that give the LoRA phase the steps of both phases.
    """

    name: str = MISSING
    base: list[str] = field(default_factory=list)
    models: dict[str, str] = MISSING
    tasks: dict[str, str] = MISSING
    levels: dict[int, float] = MISSING
    alphas: dict[int, float] = field(default_factory=dict)
    methods: dict[str, list[str]] = MISSING
    ablation_model: str | None = None
    all_steps: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises ValueError with the option's full name."""
        for option, ours, theirs in (
            ("models", self.models, paper.models()),
            ("tasks", self.tasks, paper.tasks()),
        ):
            unknown = sorted(set(ours) - set(theirs))
            if unknown or not ours:
                wrong = f"{unknown[0]!r} is not the paper's" if unknown else "it is empty"
                raise ValueError(
                    f"scale.{option}={dict(ours)}: {wrong}; say what stands for any of {', '.join(theirs)}"
                )
        if "none" not in self.methods:
            raise ValueError("scale.methods has no entry for 'none': every table compares with the dense model")
        if self.ablation_model is not None and self.ablation_model not in self.models:
            raise ValueError(f"scale.ablation_model={self.ablation_model!r}: choose one of {', '.join(self.models)}")
        for level, rate in self.levels.items():
            if not 0 < rate < 1:
                raise ValueError(f"scale.levels.{level}={rate} is not a skip rate: strictly between 0 and 1")
        for method, overrides in self.methods.items():
            if any("{alpha}" in each for each in overrides) and set(self.levels) - set(self.alphas):
                missing = sorted(set(self.levels) - set(self.alphas))
                raise ValueError(
                    f"scale.methods.{method} takes an α, and scale.alphas has none for the levels {missing}"
                )


@dataclass
class AblationConfig:
    """One row of the ablation table: the default method with some settings changed.

    Attributes:
        group: The setting.
        name: Its value.
        overrides: What makes it.
        method: Another method instead of the default one, with no level asked for: whatever its overrides skip.
    """

    group: str = MISSING
    name: str = MISSING
    overrides: list[str] = field(default_factory=list)
    method: str | None = None


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
        ablations: Their rows.
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
    ablations: list[AblationConfig] = field(default_factory=list)

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
