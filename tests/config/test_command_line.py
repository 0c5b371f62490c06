"""The command line: what is wrong with it is said in one message before anything is composed for real."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
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

from firstlab import train
from firstlab.config.command_line import LAUNCHED, command, during, guarded, own_folders
from firstlab.config.compose import conf_dir, register, search_path, settings
from firstlab.config.schema import ExperimentConfig
from firstlab.run.launch import _finish, isolated, torchrun
from firstlab.run.load import load
from firstlab.store import results
from firstlab.store.files import claimed, write_atomically
from firstlab.training.trainer import AtomicCheckpointIO


def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What `python -m firstlab.train ARGUMENTS` says is wrong, before its work starts."""
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command("train", lambda composed: settings(composed, ExperimentConfig))
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep=table1"], "use +sweep=table1"),
        (["experiment=squad_a0.01"], "use +experiment=squad_a0.01"),
        (["method=sleb", "method.gate=hard"], "has no key 'gate'; its keys are _target_, target_skip, protect_first"),
        (["method=none", "method.target_skip=0.1"], "method has no key 'target_skip'; its keys are _target_"),
        (["+experiment=squad_a0.01", "method.alhpa=1"], "method has no key 'alhpa'; its keys are _target_, alpha"),
        (["data.task.test_size=3"], "pair; another argument of its class is added: +data.task.test_size="),
        (["+lora.rnk=2"], "lora.rnk is unknown: lora has no key 'rnk'; its keys are rank"),
        (["trainer=tpu"], "Available options in 'trainer': cpu, ddp, fsdp, gpu"),
        (["lora.rank=abc"], "lora.rank=abc, Value 'abc' of type 'str' could not be converted to Integer"),
        (["evaluation.do_sample=1"], "evaluation.do_sample=1 is not allowed: evaluation.do_sample takes true or false"),
        (["--config-name", "nope"], "Cannot find primary config 'nope'"),
        (["--config-dir", "/nope"], "config directory '/nope' not found"),
        (["+sweep=table1,table2"], "Ambiguous value for argument '+sweep=table1,table2'"),
        (["seed=0,1"], "Ambiguous value for argument 'seed=0,1'"),
        (["+sweep=tabel1", "seed=0,1"], "Could not find 'sweep/tabel1'"),
        (["logger=[csv,wandb]"], "logger=[csv,wandb] is not allowed: choose one logger"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    said = complaint(capsys, monkeypatch, *arguments)
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_folder_of_ones_own_counts_where_keys_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [parallel]\nname: mine\nval_size: 7\n")
    for option in (["--config-dir", str(tmp_path)], [f"-cd={tmp_path}"], search_path([str(tmp_path)])):
        said = complaint(capsys, monkeypatch, *option, "data=mine", "lora.rnk=1")
        assert "lora" in said and "'rnk'" in said
    assert own_folders(["--config-dir", str(tmp_path), "a=b"]) == (["a=b"], [str(tmp_path)])
    with pytest.raises(ValueError, match="--config-dir /nope: there is no such folder"):
        own_folders(["-cd=/nope"])


@pytest.mark.parametrize("value", ["/a(b)/c", "~/x", 'say "a(b"', "a: b"])
def test_what_hydra_cannot_read_is_quoted(value: str, monkeypatch: pytest.MonkeyPatch):
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train", f"data.root={value}", "data=parallel"])
    seen = []
    command("train", lambda composed: seen.append(composed.data.root))
    assert seen == [value]


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
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted; the same command goes on where it was\n"
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


def test_a_folder_in_the_place_of_a_file_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "result.json").mkdir()
    with pytest.raises(SystemExit, match="2"):
        guarded(lambda folder: write_atomically(folder / "result.json", "{}"))(tmp_path)
    assert f"\nerror: a folder stands where a file should: move it away ({tmp_path}" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is always full")
@pytest.mark.parametrize("write", [write_checkpoint, write_text, write_weights])
def test_a_full_disk_is_one_message(write: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        guarded(write)(tmp_path)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "\nerror: no space left on the disk: free some; then the same command goes on where it was\n"
    )


def out_of_memory() -> None:
    with during("phase lora with lora_phase.batch_size=16"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def no_main_memory() -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")


def name_too_long() -> None:
    Path("x" * 300).write_text("")


def file_too_large() -> None:
    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "last.ckpt")


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (out_of_memory, "out of GPU memory in phase lora with lora_phase.batch_size=16: lower the phase's batch_size"),
        (no_main_memory, "out of main memory: lower the phase's batch_size"),
        (name_too_long, "a name is longer than the file system allows: shorten it (xxx"),
        (file_too_large, "a file would be larger than `ulimit -f` or the file system allows"),
    ],
)
def test_what_a_machine_lacks_is_one_message(
    fails: Callable[[], None], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        guarded(lambda _: fails(), resumes=False)(None)
    said = capsys.readouterr().err
    assert said.startswith(f"\nerror: {message}") and said.endswith("; then give the same command again\n")


@pytest.mark.parametrize("variable", [LAUNCHED, "RANK"])
def test_one_of_several_processes_speaks(
    variable: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(variable, "1")

    def stopped(_: None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        guarded(stopped)(None)
    assert capsys.readouterr().err == ""


def test_an_interrupt_while_a_command_imports_is_one_line():
    started = "import firstlab.config.command_line as c, sys; print(sys.excepthook is c._interrupted_early)"
    assert subprocess.run([sys.executable, "-c", started], capture_output=True, text=True).stdout == "False\n"
    hook = (
        "import sys, firstlab.config.command_line as c; sys.excepthook = c._interrupted_early; raise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", hook], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted; nothing had started\n")


def test_a_terminal_that_knows_ascii_alone_refuses_nothing():
    code = "from firstlab.config.command_line import guarded\nguarded(lambda _: print('α = 1 · 中'))(None)"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "\\u03b1 = 1 \\xb7 \\u4e2d\n")


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
        isolated(ends_badly, given)
    assert (directory / "failure.json").is_file() != held


def test_the_process_that_knows_says_why_a_job_failed(tmp_path: Path):
    given = a_run(tmp_path)
    config, method = load(given)

    def of_several_processes(_: object) -> None:
        results.write_failure(config.directory(method.label), RuntimeError("out of memory"))
        sys.exit(1)

    isolated(of_several_processes, given)
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
signal.signal(signal.SIGINT, stop)
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_missing_devices_are_named_before_processes_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("firstlab.run.launch._finish", lambda *_: pytest.fail("processes were started"))
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        given = compose("train", ["trainer=fsdp"])
    with pytest.raises(ValueError, match="this machine has no CUDA device; use trainer=cpu"):
        train.run(given)


def test_a_stopped_launcher_is_quiet(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, os, sys, time\npathlib.Path(sys.argv[1], os.environ['RANK']).touch()\ntime.sleep(60)\n"
    )
    command = [*torchrun(2), str(script), str(tmp_path)]
    launcher = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not all((tmp_path / rank).exists() for rank in "01") and launcher.poll() is None:
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)
    said = launcher.communicate(timeout=60)[1]
    # What a script that does not mind interrupts says itself.
    assert launcher.returncode == 130 and "torch" not in said


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
        isolated(fails, each)
    assert sorted(x.name for x in tmp_path.rglob("*") if x.is_file()) == [".new.lock", "failure.json", "precious.txt"]
    assert (tmp_path / "new" / "failure.json").is_file()
    errors = capsys.readouterr().err
    assert "choose another run_dir" in errors and "new: out of luck" in errors and "method.target_skip=7" in errors


def test_an_option_of_some_methods_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    GlobalHydra.instance().clear()
    given = ["method=first,random_skip", "data=mini_ende", "method.target_skip=0.25", "method.calibration_prompts=64"]
    plan = ["train", "+sweep=table1", *given, f"runs={tmp_path}", "sweep.plan_only=true", "sweep.recorded=null"]
    monkeypatch.setattr(sys, "argv", [*plan, "note=c"])
    with pytest.raises(SystemExit, match="2"):
        command("train", lambda _: None)
    assert "Could not override 'method.calibration_prompts'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*plan, "sweep.optional=[method.calibration_prompts]"])
    command("train", lambda _: None)
    said = capsys.readouterr().out
    assert said.count("/first-skip") == 1 and said.count("/random_skip-skip") == 1
