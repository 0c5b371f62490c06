"""What loggers receive, read back from what they wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from firstlab.run.loggers import JsonLinesLogger, PhaseLogger, close_logger, log_evaluation, logger_options, open_logger

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


def test_a_csv_file_has_the_evaluation(tmp_path: Path, predictions: Path):
    logger = CSVLogger(str(tmp_path), name="", version="")
    log_evaluation(logger, RECORD, predictions)
    close_logger(logger)
    [file] = tmp_path.rglob("metrics.csv")
    names, values = (line.split(",") for line in file.read_text().splitlines())
    assert dict(zip(names, values, strict=True))["test/router/bleu"] == "41.5"


def test_what_a_logger_says_itself_stays(tmp_path: Path):
    node = {"_target_": "lightning.pytorch.loggers.WandbLogger", "save_dir": None, "name": "mine"}
    directory = tmp_path / "task-model" / "run"
    assert logger_options(node, directory, "first") == {"save_dir": str(directory), "job_type": "first"}
    assert logger_options({**node, "name": None}, directory, "first")["name"] == "task-model/run"


def test_wandb_without_a_login_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb

    def refused(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(ValueError, match="logger=wandb cannot start .*WANDB_API_KEY.*logger.offline=true"):
        open_logger(WandbLogger(project="firstlab", save_dir=str(tmp_path)))


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


def test_an_offline_wandb_run_holds_metrics_and_the_prediction_table(tmp_path: Path, predictions: Path):
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    logger = WandbLogger(project="firstlab", save_dir=str(tmp_path), offline=True)
    logger.log_metrics({"train/loss": 1.5, "rho/layer00": 0.6}, step=0)
    log_evaluation(logger, RECORD, predictions)
    close_logger(logger)
    assert wandb.run is None  # what comes next in this process does not write into it
    wandb.teardown()  # ends its service, which may still be writing the file
    [file] = tmp_path.rglob("*.wandb")
    seen: dict[str, str] = {}
    for data in stored_records(file):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            seen[item.key or "/".join(item.nested_key)] = item.value_json
    assert json.loads(seen["train/loss"]) == 1.5 and json.loads(seen["rho/layer00"]) == 0.6
    assert json.loads(seen["test/router/bleu"]) == 41.5 and json.loads(seen["test/router/skip_rate"]) == 0.2
    [table] = tmp_path.rglob("*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"][:2] == ["variant", "id"] and content["data"][0][3] == PREDICTION["text"]


def test_phases_that_count_their_steps_alike_are_told_apart(tmp_path: Path):
    logger = JsonLinesLogger(tmp_path / "metrics.jsonl")
    for phase in ("router", "lora"):
        PhaseLogger(logger, phase).log_metrics({"train/loss": 1.5}, step=0)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) - {"time", "step"} for line in lines] == [{"router/train/loss"}, {"lora/train/loss"}]
