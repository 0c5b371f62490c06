"""Report a run's progress: always to metrics.jsonl, and to any Lightning logger as well."""

from __future__ import annotations

import json
import os
import re
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from firstlab.config import instantiate
from firstlab.config.schema import ExperimentConfig
from firstlab.store import results
from firstlab.store.files import appended, json_text
from firstlab.store.ranks import rank

#: Predictions per variant that a logger shows.
SAMPLES = 50
_COLUMNS = ["variant", "id", "difficulty", "text", "new_tokens", "skipped"]
#: The option of a logger that asks for the trained model.
LOG_MODEL = "log_model"
#: Packages that are no dependency; the extras have their names.
_EXTRAS = {TensorBoardLogger.__name__: "tensorboard", MLFlowLogger.__name__: "mlflow"}


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
        logger = build_logger(dict(config.logger), directory, method)
        if rank()[0] == 0:
            open_logger(logger)
            logger.log_hyperparams(config.identity())
        loggers.append(logger)
    return loggers


def _is_wandb(logger: dict[str, Any]) -> bool:
    return str(logger["_target_"]).endswith(WandbLogger.__name__)


def build_logger(node: dict[str, Any], directory: Path, method: str) -> Logger:
    """The logger of a `_target_` node; what the node leaves open says where to write and what the run is called.

    Raises:
        ValueError: An argument is unknown or the logger's package is not installed.
    """
    name = str(node["_target_"]).rpartition(".")[2]
    if name in _EXTRAS and find_spec(_EXTRAS[name]) is None:
        raise ValueError(f"logger={_EXTRAS[name]} is not installed: pip install 'firstlab[{_EXTRAS[name]}]'")
    options: dict[str, Any] = {"save_dir": str(directory)}
    title = f"{directory.parent.name}/{directory.name}"
    if _is_wandb(node):
        options |= {"name": title, "job_type": method}
    elif name == MLFlowLogger.__name__:
        # MLflow has a file store only if asked for it; its other stores need a database or a server.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        given = {**(node.get("tags") or {}), "job_type": method}
        tags = {key: ", ".join(value) if isinstance(value, list) else value for key, value in given.items()}
        node = {**node, "tags": {key: value for key, value in tags.items() if value}}
        options["run_name"] = title
    left_open = {key: value for key, value in options.items() if node.get(key) is None}
    # log_model is ours (see `keep_model`): Lightning would log every checkpoint, and refuses to do so offline.
    return instantiate.build(
        {key: value for key, value in node.items() if key != LOG_MODEL}, "logger", Logger, **left_open
    )


def open_logger(logger: Logger) -> None:
    """Open what a logger writes to, or raise ValueError; Lightning would leave that to the first logged step."""
    errors: type[Exception] | tuple[()] = ()
    remedy = ""
    if isinstance(logger, WandbLogger):
        from wandb.errors import Error as WandbError

        errors = WandbError
        remedy = (
            "logger=wandb cannot start ({}): log in with `wandb login`, set WANDB_API_KEY, or keep the run on this "
        )
        remedy += "machine with logger.offline=true"
    elif isinstance(logger, MLFlowLogger):
        from mlflow.exceptions import MlflowException

        errors = MlflowException
        remedy = "logger=mlflow cannot start ({}): is MLFLOW_TRACKING_URI, or logger.tracking_uri, the address of a "
        remedy += "server? Without both, runs stay on this machine"
    try:
        getattr(logger, "experiment", None)
    except errors as error:
        raise ValueError(remedy.format(str(error).splitlines()[0])) from error


def close_failed(logger: dict[str, Any] | None) -> None:
    """End the W&B run of a failed run, or the next run of the same process would write into it."""
    if logger and _is_wandb(logger):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=1)


def log_evaluation(logger: Logger, record: dict[str, Any], predictions: Path) -> None:
    """Log the record's metrics, skip rates and TPOT of every variant, and predictions to loggers that show text."""
    figures: dict[str, float] = {}
    for name, variant in record["variants"].items():
        found = {key: metric["value"] for key, metric in variant["metrics"].items()}
        found |= {"skip_rate": variant["skip"]["skip_rate"], "perplexity": variant.get("perplexity")}
        found["tpot_ratio"] = variant.get("timing", {}).get("tpot_ratio")
        figures |= {f"test/{name}/{key}": value for key, value in found.items() if value is not None}
    logger.log_metrics(figures)
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(logger.run_id, str(predictions))
    elif isinstance(logger, WandbLogger):
        logger.log_table("predictions", columns=_COLUMNS, data=_samples(predictions))
    elif isinstance(logger, TensorBoardLogger):
        rows = [" | ".join(map(str, row)) for row in ([*_COLUMNS], ["---"] * len(_COLUMNS), *_samples(predictions))]
        logger.experiment.add_text("predictions", "\n".join(f"| {row} |" for row in rows))


def _samples(predictions: Path) -> list[list[Any]]:
    lines = predictions.read_text(encoding="utf-8").split("\n")[:-1]
    rows = [{**row, "skipped": str(row["skipped"])} for row in map(json.loads, lines) if row["index"] < SAMPLES]
    return [[row[column] for column in _COLUMNS] for row in rows]


def keep_model(logger: Logger, directory: Path) -> None:
    """Log what was trained last, routers and adapter, with the run's record: a folder that `from_pretrained` loads."""
    trained = next((directory / name for name in ("refit", "lora", "router") if (directory / name).is_dir()), None)
    files = {directory / results.RESULT: results.RESULT}
    if trained is not None:
        files |= {file: f"model/{file.name}" for file in sorted(trained.iterdir()) if file.is_file()}
    if isinstance(logger, MLFlowLogger):
        for file, name in files.items():
            logger.experiment.log_artifact(logger.run_id, str(file), str(Path("firstlab", name).parent))
    elif isinstance(logger, WandbLogger):
        import wandb

        name = re.sub(r"[^\w.-]", "-", f"{directory.parent.name}-{directory.name}")
        artifact = wandb.Artifact(name, type="firstlab")
        for file, name in files.items():
            artifact.add_file(str(file), name)
        logger.experiment.log_artifact(artifact)


def close_logger(logger: Logger) -> None:
    """Write what is still held back; end a W&B run, so that the next run of this process has one of its own."""
    logger.finalize("success")
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()
