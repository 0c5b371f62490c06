"""The tutorials run from their first line to their last: small models in place of large ones, nothing left out."""

from __future__ import annotations

import csv
import importlib
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from firstlab.config.compose import conf_dir
from support.pages import BLOCK, ROOT, SHELL, Command, commands_of
from support.tiny_run import SMALL, save_tiny_model, started_with

TUTORIALS = ROOT / "docs" / "tutorials"


def follow(page: str, replaced: dict[str, str], run: Callable[[Command], None]) -> None:
    """Do what a page says, in its order: run its commands, execute its snippets."""
    text = (TUTORIALS / page).read_text(encoding="utf-8")
    for old, new in replaced.items():
        assert old in text, f"{page} no longer says {old!r}"
        text = text.replace(old, new)
    for language, block in BLOCK.findall(text):
        if language == "python":
            exec(compile(block, page, "exec"), {"__name__": page})
        elif language in SHELL:
            for command in commands_of(block, page):
                run(command)


def train(arguments: list[str]) -> None:
    from firstlab.train import run

    with started_with(*arguments), initialize_config_dir(conf_dir(), version_base="1.3"):
        run(compose("train", arguments))


def test_skip_a_quarter(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    small = [each for each in SMALL if not each.startswith(("model", "phases", "data.val_size"))]
    done: list[str] = []

    def run(command: Command) -> None:
        program, *words = command.words
        if program != "python":
            assert program in ("git", "cd", "make", "source")
            return
        module, *arguments = words[1:]
        done.append(module)
        if module == "firstlab.train":
            train([*arguments, *small])
        else:
            limit = ["evaluation.limit=3"] if module == "firstlab.evaluate" else []
            importlib.import_module(module).main([*arguments, *limit])

    replaced = {"bundled:nano": str(tiny_model_dir), "[:2500]": "[:64]", "[:100]": "[:8]", "val_size=128": "val_size=8"}
    follow("skip-a-quarter.md", replaced, run)
    assert done == ["firstlab.train", "firstlab.train", "firstlab.generate", "firstlab.evaluate"]
    assert sorted(each.parent.name for each in tmp_path.glob("runs/*/*/result.json")) == [
        "first-skip0.25-seed0",
        "none-as_tuned-seed0",
        "sleb-skip0.25-seed0",
    ]
    printed = capsys.readouterr().out
    assert "router_lora: BLEU " in printed and "tensor([[" in printed


def test_table1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The table is made of the records; that the other commands would start is tested with those of all pages."""
    from firstlab.tables.__main__ import run as write_tables
    from firstlab.tables.cells import load

    monkeypatch.chdir(tmp_path)
    records = str(ROOT / "experiments" / "nano_grid")
    fewer = ["resamples=100", "~scale.tasks.squad", "~scale.tasks.cnn_dm"]
    done: list[str] = []

    def run(command: Command) -> None:
        module, *arguments = command.words[2:]
        if module == "firstlab.tables" and not done:
            done.append(module)
            GlobalHydra.instance().clear()
            with initialize_config_dir(conf_dir(), version_base="1.3"):
                write_tables(load(compose("tables", [*arguments, *fewer])))

    follow("table1.md", {"results=[experiments]": f"results=[{records}]"}, run)
    assert done
    rows = list(csv.DictReader((tmp_path / "tables/nano/csv/table1.csv").open(encoding="utf-8")))
    assert {"Base", "Random Skip", "Unified Skip", "Skip Decode", "FiRST (ours)", "FiRST, paper's form", "SLEB"} == {
        row["Method"] for row in rows
    }
    assert "15 FiRST (ours) + LoRA 95.7" in capsys.readouterr().out


def test_serve_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra: pip install 'firstlab[serve]'")
    from firstlab.serve import ServeOptions
    from firstlab.serve.__main__ import build
    from support.serving import running

    monkeypatch.chdir(tmp_path)
    model = save_tiny_model(tmp_path / "model", num_layers=8)
    run_directory = "runs/mini_ende-nano/routes-skip0.25-seed0"
    small = [each for each in SMALL if not each.startswith(("phases", "method.", "model.name"))]
    small += ["method.fit_prompts=24", "method.calibration_prompts=4"]
    done: list[str] = []
    with ExitStack() as serving:

        def run(command: Command) -> None:
            words = [word for word in command.words if not word.startswith("FIRSTLAB_API_KEY")]
            if words[0] == "pip":
                return
            module, *arguments = words[2:]
            done.append(module)
            if module == "firstlab.train":
                train([*arguments, *small, f"model.path={model}", "model.name=nano"])
                serving.enter_context(
                    running(build(ServeOptions(run=run_directory, device="cpu"), {}, None), port=port)
                )
            elif module == "firstlab.serve.load":
                importlib.import_module(module).main([*arguments, f"url=http://127.0.0.1:{port}", "rounds=1"])
            else:
                assert module == "firstlab.serve.page" or f"run={run_directory}" in arguments

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        fewer = {"127.0.0.1:8000": f"127.0.0.1:{port}", "requests=32": "requests=4", "max_tokens=32": "max_tokens=8"}
        follow("serve.md", fewer, run)
    assert done == [f"firstlab.{each}" for each in ("train", "serve", "serve.load", "serve.page", "serve")]
    printed = capsys.readouterr().out
    assert "8 layers, skip rates up to" in printed and "0% skipped, layers [0, 1, 2, 3, 4, 5, 6, 7]:" in printed
