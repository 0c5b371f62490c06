"""The command line: what is wrong with it is said in one message before anything is composed for real."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from firstlab.config.command_line import check_command_line, guarded
from firstlab.config.compose import conf_dir, register
from firstlab.run.launch import _finish, isolated
from firstlab.run.load import load
from firstlab.store import results
from firstlab.store.files import claimed, write_atomically
from firstlab.training.trainer import AtomicCheckpointIO


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sweep=table1", "sweep=table1 names a file of conf/sweep: write +sweep=table1"),
        ("experiment=squad_a0.01", "experiment=squad_a0.01 names a file of conf/experiment: write +experiment="),
        ("+lora.rnk=2", "lora.rnk is unknown: lora has no key 'rnk'; its keys are rank"),
    ],
)
def test_a_word_that_is_almost_right_is_answered_with_what_is_right(
    argument: str, message: str, capsys: pytest.CaptureFixture
):
    register()
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        check_command_line("train", [argument])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture
def default_signals() -> Iterator[None]:
    """As in a terminal: a job in the background may have been started with signals ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupts_say_how_to_go_on(number: signal.Signals, default_signals: None, capsys: pytest.CaptureFixture[str]):
    def stopped(_: None) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    with pytest.raises(SystemExit) as stop:
        guarded(stopped)(None)
    assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("given", [OmegaConf.create({"overwrite": True}), ["+sweep=table1", "overwrite=true"]])
def test_an_overwriting_run_goes_on_without_overwriting(given: object, capsys: pytest.CaptureFixture[str]):
    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        guarded(stopped)(given)
    assert "interrupted; without overwrite=true the same command goes on" in capsys.readouterr().err


def write_checkpoint(folder: Path) -> None:
    (folder / f".last.ckpt.{os.getpid()}.tmp").symlink_to("/dev/full")
    AtomicCheckpointIO().save_checkpoint({"weight": torch.zeros(100_000)}, folder / "last.ckpt")


def write_text(folder: Path) -> None:
    (folder / f".result.json.{os.getpid()}.tmp").symlink_to("/dev/full")
    write_atomically(folder / "result.json", "{}")


def write_weights(folder: Path) -> None:
    # What safetensors raises on a full disk; it writes a file of its own and renames it.
    raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
@pytest.mark.parametrize("write", [write_checkpoint, write_text, write_weights])
def test_a_full_disk_is_one_message(write: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        guarded(write)(tmp_path)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "\nerror: no space left on the disk: free some; the same command goes on from the last checkpoint\n"
    )


def test_other_errors_keep_their_traceback():
    def broken(_: None) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        guarded(broken)(None)


def a_run(folder: Path) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("train", [f"runs={folder}"])


@pytest.mark.parametrize("held", [False, True])
def test_a_sweeps_job_leaves_a_run_that_another_does_alone(tmp_path: Path, held: bool):
    given = a_run(tmp_path)

    def ends_badly(_: object) -> None:  # what is left of several processes
        sys.exit(1)

    config, method = load(given)
    directory = config.directory(method.label)
    with claimed(directory) if held else nullcontext():
        isolated(ends_badly)(given)
    assert (directory / "failure.json").is_file() != held


def test_the_process_that_knows_says_why_a_job_failed(tmp_path: Path):
    given = a_run(tmp_path)
    config, method = load(given)

    def of_several_processes(_: object) -> None:
        results.write_failure(config.directory(method.label), RuntimeError("out of memory"))
        sys.exit(1)

    isolated(of_several_processes)(given)
    assert results.read_failure(config.directory(method.label))["error"] == "RuntimeError: out of memory"


def test_a_launchers_own_use_of_sigterm_stays():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("launcher"))
    try:
        guarded(lambda _: os.kill(os.getpid(), signal.SIGTERM))(None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["launcher"]


def test_a_stopped_launcher_stops_its_own_processes(default_signals: None, tmp_path: Path):
    ready, stopped = tmp_path / "ready", tmp_path / "stopped"
    child = f"""
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.5)
    pathlib.Path({str(stopped)!r}).touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(ready)!r}).touch()
time.sleep(60)
"""

    def interrupt() -> None:
        while not ready.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        _finish([sys.executable, "-c", child], patience_s=0.1)
    assert stopped.exists()
    assert _finish([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.parametrize(
    ("argument", "quoted"),
    [
        ("data.root=/a(b)/c", """'data.root="/a(b)/c"'"""),
        ("data.root=~x", """'data.root="~x"'"""),
        ('note=say "a(b"', """'note="say \\"a(b\\""'"""),
    ],
)
def test_what_hydra_cannot_read_is_shown_with_quotes(argument: str, quoted: str, capsys: pytest.CaptureFixture[str]):
    register()
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="2"):
        check_command_line("train", [argument])
    assert capsys.readouterr().err.strip() == f"error: {argument}: the value needs quotes: {quoted}"


def test_two_sweeps_at_a_time(capsys: pytest.CaptureFixture[str]):
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="2"):
        check_command_line("train", ["+sweep=table1,table2"])
    assert "+sweep=table1,table2: one sweep at a time" in capsys.readouterr().err


def test_a_sweep_writes_into_no_foreign_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "precious.txt").write_text("mine")
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        foreign, empty, wrong = (
            compose("train", [f"run_dir={tmp_path / name}", *more])
            for name, more in (("", []), ("new", []), ("", ["method.target_skip=7"]))
        )

    def fails(_: object) -> None:
        raise RuntimeError("out of luck")

    for each in (foreign, empty, wrong):
        isolated(fails)(each)
    assert sorted(x.name for x in tmp_path.rglob("*") if x.is_file()) == [".new.lock", "failure.json", "precious.txt"]
    assert (tmp_path / "new" / "failure.json").is_file()
    errors = capsys.readouterr().err
    assert "choose another run_dir" in errors and "new: out of luck" in errors and "method.target_skip=7" in errors
