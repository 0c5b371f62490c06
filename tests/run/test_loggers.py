"""What loggers receive, read back from what they wrote."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import WandbLogger

from firstlab.config.compose import conf_dir
from firstlab.model.lm import RouterAugmentedLM
from firstlab.run.loggers import (
    JsonLinesLogger,
    PhaseLogger,
    build_logger,
    close_logger,
    keep_model,
    log_evaluation,
    open_logger,
)
from support.tiny_run import composed

RECORD = {
    "variants": {
        "router": {
            "metrics": {"bleu": {"value": 41.5}},
            "skip": {"skip_rate": 0.2},
            "timing": {"tpot_ratio": 0.84},
            "perplexity": 2.5,
        }
    }
}
PREDICTION = {
    "variant": "router", "index": 0, "id": "a", "text": "Das Haus ist rot.",
    "new_tokens": 6, "skipped": [1, 3], "difficulty": 2,
}  # fmt: skip


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    file = tmp_path / "predictions.jsonl"
    file.write_text(json.dumps(PREDICTION) + "\n", encoding="utf-8")
    return file


def test_json_lines(tmp_path: Path, predictions: Path):
    logger = JsonLinesLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"train/loss": 1.5}, step=3)
    log_evaluation(logger, RECORD, predictions)
    first, second = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (first["step"], first["train/loss"]) == (3, 1.5)
    assert second["test/router/bleu"] == 41.5 and second["test/router/tpot_ratio"] == 0.84


def stored_records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    data, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or its last piece
            yield whole
            whole = b""


def read_csv(folder: Path) -> dict[str, float]:
    [file] = folder.rglob("metrics.csv")
    rows = csv.DictReader(file.open(encoding="utf-8"))
    return {key: float(value) for row in rows for key, value in row.items() if value and key != "step"}


def read_tensorboard(folder: Path) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert "Das Haus ist rot." in str(events.Tensors("predictions/text_summary"))
    return {key: events.Scalars(key)[0].value for key in events.Tags()["scalars"] if key != "hp_metric"}


def read_wandb(folder: Path) -> dict[str, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = folder.rglob("*.wandb")
    seen: dict[str, float] = {}
    for data in stored_records(file):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            key = item.key or "/".join(item.nested_key)
            if key.startswith(("router/", "test/")):
                seen[key] = json.loads(item.value_json)
    [table] = folder.rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:2] == ["variant", "id"] and content["data"][0][3] == PREDICTION["text"]
    return seen


def read_mlflow(folder: Path) -> dict[str, float]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder}/mlruns")
    [experiment] = (each for each in client.search_experiments() if each.name == "firstlab")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "task-model/run" and run.info.status == "FINISHED"
    assert run.data.tags["job_type"] == "first" and "group" not in run.data.tags
    assert run.data.params["seed"] == "0" and run.data.params["lora/rank"] == "8"
    assert [each.path for each in client.list_artifacts(run.info.run_id)] == ["predictions.jsonl"]
    return dict(run.data.metrics)


@pytest.mark.parametrize("name", ["csv", "tensorboard", "wandb", "mlflow"])
def test_every_logger_gets_the_same(name: str, tmp_path: Path, predictions: Path):
    pytest.importorskip({"csv": "json"}.get(name, name), reason=f"pip install 'firstlab[{name}]'")
    directory = tmp_path / "task-model" / "run"
    config, method = composed(f"logger={name}", f"runs={tmp_path}", *(["logger.offline=true"] * (name == "wandb")))
    logger = build_logger(config.logger, directory, method.name)
    open_logger(logger)
    logger.log_hyperparams(config.identity())
    PhaseLogger(logger, "router").log_metrics({"train/loss": 1.5, "skip/layer00": 0.25}, step=3)
    log_evaluation(logger, RECORD, predictions)
    close_logger(logger)
    if name == "wandb":
        import wandb

        assert wandb.run is None  # what comes next in this process does not write into it
        wandb.teardown()  # ends its service, which may still be writing the file
    figures = {"bleu": 41.5, "skip_rate": 0.2, "tpot_ratio": 0.84, "perplexity": 2.5}
    expected = {f"test/router/{key}": value for key, value in figures.items()}
    read = globals()[f"read_{name}"](tmp_path)
    assert read == pytest.approx({"router/train/loss": 1.5, "router/skip/layer00": 0.25, **expected})


def test_what_a_logger_says_itself_stays(tmp_path: Path):
    node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "save_dir": None, "offline": True}
    directory = tmp_path / "task-model" / "run"
    assert build_logger({**node, "name": "mine"}, directory, "first")._wandb_init["name"] == "mine"
    logger = build_logger(node, directory, "first")
    assert logger._wandb_init["name"] == "task-model/run" and logger._wandb_init["job_type"] == "first"
    assert logger.save_dir == str(directory)


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_logger_whose_package_is_missing_names_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("firstlab.run.loggers.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=rf"logger={name} is not installed: pip install 'firstlab\[{name}\]'"):
        build_logger(composed(f"logger={name}")[0].logger, tmp_path, "first")


@pytest.fixture
def run_directory(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """What a run leaves: routers and adapter, and the record."""
    directory = tmp_path / "task-model" / "run=1"
    model = RouterAugmentedLM.from_pretrained(tiny_model_dir)
    model.add_lora()
    model.save_pretrained(directory / "lora")
    (directory / "result.json").write_text(json.dumps(RECORD))
    return directory


def same_model(folder: Path, directory: Path) -> None:
    """The folder loads, and is what the run saved."""
    model = RouterAugmentedLM.from_pretrained(folder)
    assert model.has_lora and model.num_layers == 4
    for file in (directory / "lora").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_an_offline_wandb_run_keeps_the_model_and_the_record(
    tmp_path: Path, run_directory: Path, monkeypatch: pytest.MonkeyPatch
):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # where files wait for `wandb sync`
    logger = build_logger(composed("logger=wandb", "logger.offline=true")[0].logger, run_directory, "first")
    keep_model(logger, run_directory)
    close_logger(logger)
    wandb.teardown()
    [file] = tmp_path.rglob("*.wandb")
    artifacts = []
    for data in stored_records(file):
        record = Record()
        record.ParseFromString(data)
        request = record.request.log_artifact.artifact if record.request.HasField("log_artifact") else record.artifact
        artifacts += [request] if request.name == "task-model-run-1" else []
    [artifact] = artifacts
    assert artifact.type == "firstlab"
    for entry in artifact.manifest.contents:
        target = tmp_path / "back" / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(entry.local_path, target)
    assert json.loads((tmp_path / "back" / "result.json").read_text()) == RECORD
    same_model(tmp_path / "back" / "model", run_directory)


def test_mlflow_keeps_the_model_and_the_record(tmp_path: Path, run_directory: Path):
    pytest.importorskip("mlflow", reason="pip install 'firstlab[mlflow]'")
    logger = build_logger(composed("logger=mlflow", f"runs={tmp_path}")[0].logger, run_directory, "first")
    keep_model(logger, run_directory)
    close_logger(logger)
    folder = Path(logger.experiment.download_artifacts(logger.run_id, "firstlab", str(tmp_path)))
    assert json.loads((folder / "result.json").read_text()) == RECORD
    same_model(folder / "model", run_directory)


def test_an_mlflow_server_that_is_not_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow", reason="pip install 'firstlab[mlflow]'")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    node = composed("logger=mlflow", "logger.tracking_uri=http://127.0.0.1:9")[0].logger
    with pytest.raises(ValueError, match="logger=mlflow cannot start .*MLFLOW_TRACKING_URI"):
        open_logger(build_logger(node, tmp_path, "first"))


def test_the_wandb_sweep_starts_runs_with_directories_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """The command of each run as W&B's agent makes it."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((Path(conf_dir()) / "wandb_sweep.yaml").read_text(encoding="utf-8"))
    assert sweep["metric"] == {"name": "lora/val/cross_entropy", "goal": "minimize"}
    chosen = {"lora_phase.learning_rate": 0.0005, "lora.rank": 16, "method.hold_routes": 3}
    assert chosen.keys() == sweep["parameters"].keys()
    found = create_sweep_command_args({"args": {key: {"value": value} for key, value in chosen.items()}})
    command = create_sweep_command(sweep["command"])
    assert command[:4] == ["${env}", "python", "-m", "firstlab.train"] and command[-1] == "${args_no_hyphens}"
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    config, method = composed(*command[4:-1], *found["args_no_hyphens"])
    assert config.directory(method.label) == Path("runs/wandb/abc123")
    assert (config.lora.rank, config.lora_phase.learning_rate, method.hold_routes) == (16, 0.0005, 3)


def test_wandb_without_a_login_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    def refused(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ValueError, match="logger=wandb cannot start .*WANDB_API_KEY.*logger.offline=true"):
        open_logger(WandbLogger(project="firstlab", save_dir=str(tmp_path)))


def test_phases_that_count_their_steps_alike_are_told_apart(tmp_path: Path):
    logger = JsonLinesLogger(tmp_path / "metrics.jsonl")
    for phase in ("router", "lora"):
        PhaseLogger(logger, phase).log_metrics({"train/loss": 1.5}, step=0)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) - {"time", "step"} for line in lines] == [{"router/train/loss"}, {"lora/train/loss"}]
