"""Report a run's progress: always to metrics.jsonl, and to any Lightning logger as well."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from firstlab.store.files import appended, json_text

SAMPLES = 50


class JsonLinesLogger(Logger):
    """One JSON object per logged step, appended to a file; a resumed run repeats the steps since its checkpoint."""

    name, version = "jsonl", ""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with appended(self.file) as out:
            out.write(json_text({"step": step, "time": time.time(), **metrics}) + "\n")


class PhaseLogger(Logger):
    """Puts the phase in front of every name (router/train/loss): both phases count their steps from 0."""

    def __init__(self, logger: Logger, phase: str) -> None:
        super().__init__()
        self.logger, self.phase = logger, phase

    @property
    def name(self) -> str | None:
        """Of the logger."""
        return self.logger.name

    @property
    def version(self) -> int | str | None:
        """Of the logger."""
        return self.logger.version

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The run logs its own."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """With the phase in front of the names."""
        self.logger.log_metrics({f"{self.phase}/{name}": value for name, value in metrics.items()}, step)

    def save(self) -> None:
        """As the logger does."""
        self.logger.save()


def _is_wandb(logger: dict[str, Any]) -> bool:
    return logger["_target_"].endswith(WandbLogger.__name__)


def logger_options(logger: dict[str, Any], directory: Path, method: str) -> dict[str, Any]:
    """What its run gives a logger that says nothing else: where to write and, in W&B, how the run is called."""
    options: dict[str, Any] = {"save_dir": str(directory)}
    if _is_wandb(logger):
        options |= {"name": f"{directory.parent.name}/{directory.name}", "job_type": method}
    return {key: value for key, value in options.items() if logger.get(key) is None}


def open_logger(logger: Logger) -> None:
    """Let a logger open what it writes to, which Lightning would leave to the first logged step.

    Raises:
        ValueError: W&B refuses.
    """
    if not isinstance(logger, WandbLogger):
        getattr(logger, "experiment", None)
        return
    import wandb

    try:
        _ = logger.experiment
    except wandb.errors.Error as error:
        raise ValueError(
            f"logger=wandb cannot start ({str(error).splitlines()[0]}): log in with `wandb login`, set WANDB_API_KEY, "
            "or keep the run on this machine with logger.offline=true"
        ) from error


def close_failed(logger: dict[str, Any] | None) -> None:
    """End the W&B run of a failed run, which the next run of the same process would otherwise write into."""
    if logger and _is_wandb(logger):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=1)


def log_evaluation(logger: Logger, record: dict[str, Any], predictions: Path) -> None:
    """Report the evaluation of every variant: metrics, skip rates, TPOT, and sample predictions as a W&B table.

    Args:
        logger: Where to.
        record: What result.json will hold.
        predictions: The run's predictions.jsonl.
    """
    figures: dict[str, float] = {}
    for name, variant in record["variants"].items():
        figures |= {f"test/{name}/{key}": metric["value"] for key, metric in variant["metrics"].items()}
        figures[f"test/{name}/skip_rate"] = variant["skip"]["skip_rate"]
        if "timing" in variant:
            figures[f"test/{name}/tpot_ratio"] = variant["timing"]["tpot_ratio"]
        if "perplexity" in variant:
            figures[f"test/{name}/perplexity"] = variant["perplexity"]
    logger.log_metrics(figures)
    if isinstance(logger, WandbLogger):
        lines = predictions.read_text(encoding="utf-8").split("\n")[:-1]
        columns = ["variant", "id", "difficulty", "text", "new_tokens", "skipped"]
        wanted = [row for row in map(json.loads, lines) if row["index"] < SAMPLES]
        data = [[str(row[c]) if c == "skipped" else row[c] for c in columns] for row in wanted]
        logger.log_table("predictions", columns=columns, data=data)


def close_logger(logger: Logger) -> None:
    """Write what is still held back, and end a W&B run: the next run of this process has one of its own."""
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
