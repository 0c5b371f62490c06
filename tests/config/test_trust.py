"""Nothing that a saved directory or a record says is run: hostile nodes, fed to every command and every reader."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import firstlab.run.load
from firstlab import evaluate, generate, train
from firstlab.config import instantiate
from firstlab.config.compose import conf_dir, load_dict, register
from firstlab.config.grid import Run
from firstlab.metrics.comet import CometConfig
from firstlab.run.directory import check_directory
from firstlab.run.experiment import Experiment
from firstlab.run.load import read
from firstlab.run.report import neighbours
from firstlab.run.sweep import collect, plan
from firstlab.tables.records import read as read_tables
from support.made_records import record
from support.tiny_run import composed, overrides

TOUCH = ["touch", "MARK"]
TASK = "firstlab.data.mini_translation.MiniTranslation"
MIXTURE, PART = "firstlab.data.mixture.Mixture", "firstlab.data.mixture.Part"
SLEB = "firstlab.methods.sleb.SLEB"
POPEN = {"_target_": "subprocess.Popen", "args": TOUCH}
SYSTEM = {"_target_": "os.system", "command": "touch MARK"}


def call(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def mixture(part: Any) -> dict[str, Any]:
    fine = call(PART, task=call(TASK, pair="en-de"))
    return call(MIXTURE, parts={"a": fine, "b": part})


#: Where a node stands in a saved configuration, and what is there; null removes nothing.
HOSTILE: list[tuple[str, Any]] = [
    ("method", POPEN),
    ("method", call("planted.Thing")),
    ("method", call("builtins.eval", _args_=["open('MARK', 'w')"])),
    ("method", call("builtins.exec", _args_=["open('MARK', 'w')"], _partial_=False)),
    ("method", call("firstlab.run.launch._finish", command=TOUCH)),
    ("method", call("firstlab.run.launch.subprocess.Popen", args=TOUCH)),
    ("method", call("firstlab.methods.sleb.torch.utils.collect_env.run", command="touch MARK")),
    ("method", call("firstlab.methods..planted.Thing")),
    ("method", call("firstlab.data.mini_qa.MiniQA")),
    ("method", [POPEN]),
    ("method.alpha", call("firstlab.run.launch._finish", command=TOUCH)),
    ("method.alpha", call("numpy.testing.runstring", astr="open('MARK', 'w')", dict={})),
    ("method.alpha", call("torch.utils.collect_env.run", command="touch MARK")),
    ("method.alpha", [{"deep": [SYSTEM]}]),
    ("method.gate", call("hydra.utils.instantiate", config=POPEN)),
    ("method._partial_", True),
    ("method._args_", [SYSTEM]),
    ("method._recursive_", True),
    ("method._convert_", "all"),
    ("method", call(SLEB, target_skip=POPEN)),
    ("data.task", POPEN),
    ("data.task", call("planted.Thing")),
    ("data.task", call("firstlab.data.files.os.system", command="touch MARK")),
    ("data.task.pair", SYSTEM),
    ("data.task.pair", call("planted.Thing")),
    ("data.task", mixture(POPEN)),
    ("data.task", mixture(call(PART, task=POPEN))),
    ("data.task", mixture(call(PART, task=call(TASK, pair=SYSTEM)))),
    ("data.task", mixture(call(PART, task=call(TASK, pair="en-de"), max_new_tokens=SYSTEM))),
    ("data.task", mixture(call("planted.Thing"))),
    ("data.root", SYSTEM),
    ("logger", call("planted.Thing")),
    ("logger", call("lightning.pytorch.loggers.CSVLogger", save_dir=SYSTEM)),
    ("logger", POPEN),
    ("evaluation.comet", {"command": "./planted.sh", "model": "Unbabel/XCOMET-XL"}),
    ("evaluation.comet.model", "planted.ckpt"),
    ("evaluation.bertscore.path", SYSTEM),
    ("model", {**POPEN, "name": "x", "path": "y"}),
    ("model.path", "${oc.env:SECRET}"),
    ("model.path", "${oc.decode:${oc.env:SECRET}}"),
    ("model.name", "${oc.create:${oc.env:SECRET}}"),
    ("note", "${hydra:runtime.cwd}"),
    ("method.target_skip", "${oc.env:SECRET}"),
    ("data.task.${oc.env:SECRET}", 1),
    ("hydra", {"searchpath": ["file://planted"], "run": {"dir": "planted"}}),
    ("hydra.callbacks", {"a": SYSTEM}),
    ("defaults", ["/planted"]),
    ("lora.target_modules", [SYSTEM]),
    ("sweep.tables", [POPEN]),
]
#: What no command takes from a saved file, or what is no more than text there.
INERT = ("logger", "evaluation.comet", "lora.target_modules", "sweep.tables")
hostile = pytest.mark.parametrize(("path", "node"), HOSTILE, ids=lambda x: x if isinstance(x, str) else "")


def put(config: dict[str, Any], path: str, node: Any) -> dict[str, Any]:
    """A configuration with the node at the path."""
    changed = copy.deepcopy(config)
    *parents, last = path.split(".", 2) if "${" in path else path.split(".")
    place = changed
    for each in parents:
        place = place.setdefault(each, {})
    place[last] = copy.deepcopy(node)
    return changed


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A working directory with a module, a program and a checkpoint that leave a mark; says that they have not."""
    for name in ("planted.py", "planted.sh", "planted.ckpt"):
        (tmp_path / name).write_text("#!/bin/sh\ntouch MARK\n" if name.endswith(".sh") else "open('MARK', 'w')\n")
    (tmp_path / "planted.sh").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SECRET", "planted")
    monkeypatch.setattr(instantiate, "_trusted", set())

    def untouched() -> None:
        assert "planted" not in sys.modules and not (tmp_path / "MARK").exists()

    return untouched


def saved_run(path: str, node: Any) -> dict[str, Any]:
    """config.yaml of a run directory `run` that has begun, and what was in it before the node."""
    config = composed(*overrides(Path("model"), Path("runs"), "phases=[evaluate]", "run_dir=run"))[0].to_dict()
    Path("run", "router").mkdir(parents=True)
    Path("run", "config.yaml").write_text(yaml.safe_dump(put(config, path, node)))
    return config


@hostile
def test_commands_run_nothing_of_a_run_directory(
    path: str,
    node: Any,
    trap: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def loads(*_: object) -> None:
        raise ValueError("its model is loaded")

    saved_run(path, node)
    monkeypatch.setattr(firstlab.run.load, "load_model", loads)
    for main, more in ((evaluate.main, []), (generate.main, ["text"])):
        with pytest.raises(SystemExit, match="2"):
            main(["run=run", *more])
        said = capsys.readouterr().err
        assert (
            (path in INERT) == ("its model is loaded" in said) and said.startswith("error: ") and said.count("\n") == 1
        )
        trap()
    monkeypatch.setattr(Experiment, "run", lambda _: loads())
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        register()
        given = compose("train", [*overrides(Path("model"), Path("runs")), "phases=[evaluate]", "run_dir=run"])
    with pytest.raises(ValueError):
        train.run(given)
    trap()


def test_what_no_command_takes_from_a_saved_file(trap: Callable[[], None]):
    saved_run("evaluation.comet", {"command": "./planted.sh", "model": "Unbabel/XCOMET-XL", "batch_size": 3, "gpus": 0})
    config, _ = read(Path("run/config.yaml"))
    assert (config.evaluation.comet.command, config.evaluation.comet.batch_size) == (CometConfig().command, 3)
    config, _ = read(
        Path("run/config.yaml"), {"evaluation.comet.command": "./mine", "evaluation.comet.model": "x.ckpt"}
    )
    assert (config.evaluation.comet.command, config.evaluation.comet.model) == ("./mine", "x.ckpt")
    assert config.logger is None


@hostile
def test_readers_of_records_run_nothing(path: str, node: Any, trap: Callable[[], None]):
    made = record(Run("mini_ende", "nano", "first", 0.15, ("data=mini_ende", "method=first")))
    config = composed(*overrides(Path("model"), Path("runs"), "run_dir=null"))[0]
    made |= {"model": "tiny", "config": put(config.to_dict(), path, node), "wall_s": 1.0}
    for file in ("experiments/study/results/one.json", "runs/mini_ende-tiny/other/result.json"):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_text(json.dumps(made))
    Path("runs/mini_ende-tiny/other/config.yaml").write_text(yaml.safe_dump(made["config"]))

    def make(arguments: list[str]) -> DictConfig:
        return compose("train", arguments)

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        register()
        planned = plan([overrides(Path("model"), Path("runs"))], make, Path("experiments"))
    assert planned[0].state in ("to do", "finished")
    trap()
    read_tables(["experiments", "runs"])
    trap()
    neighbours(Path("runs/mini_ende-tiny/mine"), made)
    trap()
    for use in (
        lambda: load_dict(made["config"]).hash(),
        lambda: check_directory(Path("runs/mini_ende-tiny/other"), config),
        lambda: collect(planned, Path("experiments/study")),
    ):
        try:
            use()
        except ValueError as error:
            assert "\n" not in str(error)
        trap()


@pytest.mark.parametrize(
    "text", ["!!python/object/apply:os.system [touch MARK]", "!!python/name:planted.Thing", "&a [*a]", "[&a [x], *a]"]
)
def test_yaml_makes_no_objects(text: str, trap: Callable[[], None]):
    saved_run("note", None)
    file = Path("run/config.yaml")
    file.write_text(file.read_text().replace("note: null", f"note: {text}"))
    for use in (lambda: read(file), lambda: check_directory(Path("run"), composed()[0])):
        with pytest.raises(ValueError, match="config.yaml|delete run"):
            use()
    trap()


def test_a_class_of_ones_own_is_named_again(trap: Callable[[], None], monkeypatch: pytest.MonkeyPatch):
    Path("mine.py").write_text(
        "from dataclasses import dataclass\nfrom firstlab.methods.none import Dense\n\n\n"
        "@dataclass\nclass Mine(Dense):\n    level: int = 3\n    name = 'mine'\n"
    )
    saved_run("method", call("mine.Mine"))
    file = Path("run/config.yaml")
    with pytest.raises(ValueError, match=r"method._target_='mine.Mine' stands in a saved file.*trust=mine$"):
        read(file)
    assert "mine" not in sys.modules
    assert "level" not in load_dict(yaml.safe_load(file.read_text())).identity()["method"]
    instantiate.trust(["mine"])
    config, method = read(file)
    assert method.level == 3 and config.identity()["method"]["level"] == 3
    del sys.modules["mine"]
    monkeypatch.setattr(instantiate, "_trusted", set())
    assert composed("method=none", "method._target_=mine.Mine")[1].level == 3  # named on the command line
    del sys.modules["mine"]
