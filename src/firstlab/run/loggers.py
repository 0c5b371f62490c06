"""Report a run's progress: always to metrics.jsonl, and to any Lightning logger as well."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from firstlab.config import instantiate
from firstlab.config.schema import ExperimentConfig
from firstlab.store.files import appended, json_text
from firstlab.store.ranks import rank


class _MetricsLogger(Logger):
    name = version = None

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run logs its own, and they are in config.yaml."""


class JsonLinesLogger(_MetricsLogger):
    """Appends one JSON object per logged step; a resumed run repeats the steps since its checkpoint."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with appended(self.file) as out:
            out.write(json_text({"step": step, "time": time.time(), **metrics}) + "\n")


class PhaseLogger(_MetricsLogger):
    """Puts the phase in front of every name (router/train/loss): both phases count their steps from 0."""

    def __init__(self, logger: Logger, phase: str) -> None:
        super().__init__()
        self.logger, self.phase = logger, phase

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logger.log_metrics({f"{self.phase}/{name}": value for name, value in metrics.items()}, step)

    def save(self) -> None:
        self.logger.save()


def open_loggers(config: ExperimentConfig, directory: Path, method: str) -> list[Logger]:
    """A run's metrics.jsonl and its configured logger."""
    loggers: list[Logger] = [JsonLinesLogger(directory / "metrics.jsonl")]
    if config.logger:
        node = dict(config.logger)
        logger = instantiate.build(node, "logger", Logger, **logger_options(node, directory, method))
        if rank()[0] == 0:
            open_logger(logger)
            logger.log_hyperparams(config.identity())
        loggers.append(logger)
    return loggers


def _is_wandb(logger: dict[str, Any]) -> bool:
    return str(logger["_target_"]).endswith(WandbLogger.__name__)


def logger_options(logger: dict[str, Any], directory: Path, method: str) -> dict[str, Any]:
    """Options of a `_target_` node that it leaves open: where to write and, in W&B, the run's name and job type."""
    options = {"save_dir": str(directory)}
    if _is_wandb(logger):
        options |= {"name": f"{directory.parent.name}/{directory.name}", "job_type": method}
    return {key: value for key, value in options.items() if logger.get(key) is None}


def open_logger(logger: Logger) -> None:
    """Open what a logger writes to, or raise ValueError; Lightning would leave that to the first logged step."""
    if not isinstance(logger, WandbLogger):
        getattr(logger, "experiment", None)
        return
    import wandb

    try:
        _ = logger.experiment
    except wandb.errors.Error as error:
        remedy = "log in with `wandb login`, set WANDB_API_KEY, or choose logger.offline=true"
        raise ValueError(f"logger=wandb cannot start ({str(error).splitlines()[0]}): {remedy}") from error


def close_failed(logger: dict[str, Any] | None) -> None:
    """End the W&B run of a failed run, or the next run of the same process would write into it."""
    if logger and _is_wandb(logger):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=1)


def log_evaluation(logger: Logger, record: dict[str, Any], predictions: Path) -> None:
    """Log the record's metrics, skip rates and TPOT of every variant; to W&B also a table of sample predictions."""
    figures: dict[str, float] = {}
    for name, variant in record["variants"].items():
        found = {key: metric["value"] for key, metric in variant["metrics"].items()}
        found |= {"skip_rate": variant["skip"]["skip_rate"], "perplexity": variant.get("perplexity")}
        found["tpot_ratio"] = variant.get("timing", {}).get("tpot_ratio")
        figures |= {f"test/{name}/{key}": value for key, value in found.items() if value is not None}
    logger.log_metrics(figures)
    if isinstance(logger, WandbLogger):
        columns = ["variant", "id", "difficulty", "text", "new_tokens", "skipped"]
        lines = predictions.read_text(encoding="utf-8").split("\n")[:-1]
        rows = [{**row, "skipped": str(row["skipped"])} for row in map(json.loads, lines) if row["index"] < 50]
        logger.log_table("predictions", columns=columns, data=[[row[c] for c in columns] for row in rows])


def close_logger(logger: Logger) -> None:
    """Write what is still held back; end a W&B run, so that the next run of this process has one of its own."""
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
