"""COMET through its command line: a stand-in program always, the real one with a tiny model where it is installed."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from firstlab.metrics.comet import CometConfig, comet
from firstlab.metrics.scores import MetricUnavailableError

ROOT = Path(__file__).resolve().parents[2]
COMET_BIN = ROOT / ".venv-comet" / "bin"

# Scores a segment by the length of its texts, and keeps what it was asked beside itself.
STAND_IN = """
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
for name in ("-s", "-t", "-r", "--model", "--to_json", "--batch_size", "--gpus"):
    parser.add_argument(name, required=True)
for name in ("--quiet", "--only_system"):
    parser.add_argument(name, action="store_true")
options = parser.parse_args()
files = [open(path, encoding="utf-8").readlines() for path in (options.s, options.t, options.r)]
asked = {"options": vars(options), "files": files, "pythonpath": os.environ.get("PYTHONPATH")}
pathlib.Path(__file__).with_name("asked.json").write_text(json.dumps(asked))
segments = [{"src": s, "mt": t, "ref": r, "COMET": len(t.strip()) / 100} for s, t, r in zip(*files, strict=True)]
"""
ANSWER = "json.dump({options.t: segments}, open(options.to_json, 'w', encoding='utf-8'))\n"


@pytest.fixture
def program(tmp_path):
    """Makes a stand-in for comet-score that ends in the given Python code; returns its configuration."""

    def make(ending=ANSWER, **settings):
        path = tmp_path / "comet-score"
        path.write_text(f"#!{sys.executable}\n{STAND_IN}{ending}", encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return CometConfig(**{"model": "Unbabel/XCOMET-XL", "batch_size": 16, **settings}, command=str(path))

    return make


def asked(config):
    return json.loads(Path(config.command).with_name("asked.json").read_text())


def test_scores_come_back_in_order(program):
    config = program(model="Unbabel/wmt22-comet-da", batch_size=3, gpus=2)
    scores = comet(["a", "b"], ["1234", "12"], [("x", "y"), ("z",)], config)
    assert scores.per_example == pytest.approx([4.0, 2.0]) and scores.value == pytest.approx(3.0)
    assert scores.signature == "model:Unbabel/wmt22-comet-da|refs:first|empty:0"
    options, files = asked(config)["options"], asked(config)["files"]
    assert (options["model"], options["batch_size"], options["gpus"]) == ("Unbabel/wmt22-comet-da", "3", "2")
    assert files == [["a\n", "b\n"], ["1234\n", "12\n"], ["x\n", "z\n"]]


def test_one_line_per_segment_whatever_the_text(program):
    sources = ["two\nlines", "carriage\rreturn", "\u2028sep\x85arated\x0b", "lone \udc80", ""]
    config = program()
    scores = comet(sources, ["a\n\nb", "ab", "äöü", "\tab ", "猫"], [("r\n",)] * 5, config)
    assert scores.per_example == pytest.approx([3, 2, 3, 2, 1])
    files = asked(config)["files"]
    assert [len(lines) for lines in files] == [5, 5, 5]
    assert files[0] == ["two lines\n", "carriage return\n", "sep arated\n", "lone ?\n", "\n"]


def test_empty_predictions_score_zero_unseen(program):
    config = program()
    assert comet(["a", "b", "c"], ["", "12", " \n"], [("x",)] * 3, config).per_example == pytest.approx([0, 2, 0])
    assert asked(config)["files"][0] == ["b\n"]


def test_all_empty_needs_no_run(program):
    assert comet(["a"], [""], [("x",)], program("raise SystemExit(1)")).per_example == [0.0]


def test_a_local_directory_means_its_checkpoint(program, tmp_path):
    folder = tmp_path / "my-comet"
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = folder / "checkpoints" / "model.ckpt"
    for model in (str(folder), str(checkpoint)):
        config = program(model=model)
        assert "model:my-comet|" in comet(["a"], ["b"], [("c",)], config).signature
        assert asked(config)["options"]["model"] == str(checkpoint)


def test_our_packages_stay_out_of_its_environment(program, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    config = program()
    comet(["a"], ["b"], [("c",)], config)
    assert asked(config)["pythonpath"] is None


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("raise KeyError(\"Model 'x' not supported by COMET.\")", r"exit status 1:(.|\n)*gated(.|\n)*not supported"),
        ("raise SystemExit('out of memory')", "exit status 1:\nout of memory"),
        ("raise SystemExit(3)", "exit status 3:\nno error output"),
        ("pass", "exit status 0:\nno error output"),
        ("open(options.to_json, 'w').write('{')", "unknown form: '{'"),
        ("open(options.to_json, 'w').write('[]')", "unknown form"),
        ("open(options.to_json, 'w').write('{\"a\": [{\"score\": 1}]}')", "unknown form"),
        ("segments.pop()\n" + ANSWER, "returned 0 scores for 1 segments"),
        ("segments[0]['COMET'] = float('nan')\n" + ANSWER, "not a number"),
    ],
)
def test_failures_say_what_happened(program, ending, message):
    with pytest.raises(MetricUnavailableError, match=message):
        comet(["a"], ["b"], [("c",)], program(ending))


def test_absent_program(tmp_path):
    with pytest.raises(MetricUnavailableError, match="run 'make comet'"):
        comet(["a"], ["b"], [("c",)], CometConfig(command=str(tmp_path / "comet-score")))


def test_bad_inputs(program):
    config = program()
    with pytest.raises(ValueError, match="0 sources but 1 predictions"):
        comet([], ["a"], [("b",)], config)
    with pytest.raises(ValueError, match="nothing to score"):
        comet([], [], [], config)
    with pytest.raises(ValueError, match="batch_size=0"):
        CometConfig(batch_size=0)
    with pytest.raises(ValueError, match="gpus=-1"):
        CometConfig(gpus=-1)


@pytest.mark.skipif(not COMET_BIN.exists(), reason="the COMET environment is not there: run 'make comet'")
def test_real_program_with_a_tiny_model(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    built = subprocess.run(
        [str(COMET_BIN / "python"), str(ROOT / "tests" / "support" / "tiny_comet.py"), str(tmp_path / "tiny")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    config = CometConfig(command=str(COMET_BIN / "comet-score"), model=str(tmp_path / "tiny"), batch_size=2)
    triples = [("Good day.", "Guten Tag.", "Tag!"), ("A cat", "Ein\nHund", "Eine Katze"), ("No", "", "Nein")]
    triples += triples[::-1]  # the program sorts by length: the same text must get the same score at both places
    sources, predictions, references = (list(column) for column in zip(*triples, strict=True))
    scores = comet(sources, predictions, [(text,) for text in references], config).per_example
    assert scores[2] == scores[3] == 0.0
    assert len(set(scores[:3])) == 3
    assert scores[:3] == pytest.approx(scores[:2:-1], abs=0.1)  # the program runs in half precision
