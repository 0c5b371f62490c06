"""JSON without numbers that JSON does not know, and directories that cannot be had."""

import errno
import fcntl
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from firstlab.bench import decoding, report, training
from firstlab.bench.config import BenchmarkConfig, TrainingSpeedConfig
from firstlab.run.loggers import JsonLinesLogger
from firstlab.store import results
from firstlab.store.files import check_writable, claimed, json_text, read_own, remove_torn, sealed, yaml_text


def test_what_is_not_finite_is_null():
    value = {"a": [1.5, math.inf, (-math.inf, "x")], "b": {"c": math.nan, "d": None, "e": True}}
    assert json.loads(json_text(value)) == {"a": [1.5, None, [None, "x"]], "b": {"c": None, "d": None, "e": True}}
    assert json_text({"ü": 1}) == '{"ü": 1}'


def test_a_record_is_strict_json(tmp_path: Path):
    def refuse(constant: str):
        raise AssertionError(constant)

    results.write(tmp_path, {"perplexity": math.inf, "loss": math.nan})
    text = (tmp_path / results.RESULT).read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=refuse) == {"perplexity": None, "loss": None}
    assert [file.name for file in tmp_path.iterdir()] == [results.RESULT]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    wanted = tmp_path / "file" / "runs" / "first"
    with (
        pytest.raises(ValueError, match=rf"{wanted} cannot be written \(Not a directory\); choose another"),
        claimed(wanted),
    ):
        pass


def test_nothing_is_written_through_a_link_that_came_with_a_directory(tmp_path: Path):
    (tmp_path / "precious").write_text("kept")
    for name in (".run.lock", "metrics.jsonl"):
        (tmp_path / name).symlink_to("precious")
    with pytest.raises(ValueError, match="run cannot be written"), claimed(tmp_path / "run"):
        pass
    with pytest.raises(OSError, match="symbolic links"):
        JsonLinesLogger(tmp_path / "metrics.jsonl").log_metrics({"loss": 1.0})
    assert (tmp_path / "precious").read_text() == "kept"


@pytest.mark.parametrize(
    "harm", [lambda x: x[:-1], lambda x: x.replace("12", "13"), lambda x: "", lambda x: x + "b: 2\n"]
)
def test_a_sealed_file_is_as_it_was_written(tmp_path: Path, harm: Callable[[str], str]):
    file, value = tmp_path / "router.yaml", {"seconds": 12.5, "rates": [1, 2]}
    shared = [1, 2]
    assert yaml_text([shared, shared]).count("1") == 2  # no aliases, which are not read
    file.write_text(sealed(yaml_text(value)))
    assert read_own(file, dict) == value
    file.write_text(harm(file.read_text()))
    with pytest.raises(ValueError, match="router.yaml is missing or damaged .*checksum"):
        read_own(file, dict)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    with pytest.raises(ValueError, match=r"run: its file system locks no files .*-o flock"), claimed(tmp_path / "run"):
        pass


def test_an_output_folder_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "new" / "folder", "out")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    for module, config in ((decoding, BenchmarkConfig), (training, TrainingSpeedConfig)):
        monkeypatch.setattr(module, "measure", lambda _: pytest.fail("measured"))
        with pytest.raises(ValueError, match=f"out={tmp_path / 'file' / 'x'} cannot be written .* another folder"):
            report.run(config(out=str(tmp_path / "file" / "x")))


def test_what_a_kill_left_half_written_is_removed(tmp_path: Path):
    torn = [".result.json.123.tmp", "evaluation/.router.yaml.9.tmp", "checkpoints/lora/.last.ckpt.77.tmp"]
    kept = ["result.json", ".notes.tmp", "checkpoints/lora/last.ckpt"]
    for name in torn + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_torn(tmp_path)
    assert sorted(str(x.relative_to(tmp_path)) for x in tmp_path.rglob("*") if x.is_file()) == sorted(kept)
