"""Start the processes of a run, and keep one failing run of a sweep from ending the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from firstlab.config.command_line import LAUNCHED, quiet
from firstlab.config.compose import own_conf_dirs, search_path
from firstlab.config.schema import TrainerConfig
from firstlab.run.directory import check_directory
from firstlab.run.load import load
from firstlab.run.loggers import close_failed
from firstlab.store import results
from firstlab.store.files import claimed

# torchrun without its tracebacks, for when it is stopped, or one of its processes ends badly and has said why.
_TORCHRUN = """
import logging, sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable(logging.WARNING)
try:
    main()
except SignalException:
    sys.exit(130)
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    if code < 0:
        print(f"a process was killed by signal {-code}", file=sys.stderr)
    sys.exit(code if code > 0 else 1)
"""


def torchrun(processes: int) -> list[str]:
    """The command that starts a script or, after -m, a module in several processes of this machine."""
    return [sys.executable, "-c", _TORCHRUN, "--standalone", "--nproc-per-node", str(processes)]


def is_sweep_job() -> bool:
    """Whether Hydra runs this as one job of a sweep."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def isolated(main: Callable[[DictConfig], None], composed: DictConfig) -> None:
    """Let a sweep outlive a failing run: its error and traceback go to failure.json in the run directory."""
    quiet()
    directory = ours = None
    try:
        config, method = load(composed)
        directory = config.directory(method.label)
        print(f"run: {directory}", flush=True)
        check_directory(directory, config)
        ours = directory
        (ours / results.FAILURE).unlink(missing_ok=True)
        main(composed)
    except (Exception, SystemExit) as error:  # processes of a run that ended badly come back as the latter
        print(f"failed: {directory or 'a run'}: {error}", file=sys.stderr, flush=True)
        if ours is not None:
            close_failed(config.logger)
            # Not in a run that another process is doing; nor instead of what one of its own processes said.
            with suppress(ValueError), claimed(ours, wait=False):
                if not (ours / results.FAILURE).is_file():
                    results.write_failure(ours, error)


def _finish(command: list[str], environment: Mapping[str, str] | None = None, patience_s: float = 1.0) -> int:
    """The exit status of a launcher of processes; on Ctrl-C `subprocess.run` would kill it, and not its processes."""
    with subprocess.Popen(command, env=environment) as launcher:
        try:
            return launcher.wait()
        except KeyboardInterrupt:
            try:
                launcher.wait(patience_s)  # a terminal has told it already
            except subprocess.TimeoutExpired:
                launcher.send_signal(signal.SIGINT)
                launcher.wait()
            raise


def in_processes(trainer: TrainerConfig) -> bool:
    """Start firstlab.train in several processes if that is asked for and this is none of them; True once done."""
    per_node, nodes, world = trainer.devices, trainer.num_nodes, int(os.environ.get("WORLD_SIZE", "1"))
    if (wanted := per_node * nodes) == 1:
        return False
    if world > 1:
        if world != wanted:
            raise ValueError(f"trainer.devices × num_nodes is {wanted}, and {world} processes run; start as many")
        if not dist.is_initialized():
            if trainer.accelerator == "gpu":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            # The others wait for what the first does alone: a search, an evaluation with COMET, timing.
            dist.init_process_group("nccl" if trainer.accelerator == "gpu" else "gloo", timeout=timedelta(days=1))
        return False
    if nodes > 1:
        started = f"torchrun --nnodes {nodes} --nproc-per-node {per_node} -m firstlab.train ..."
        raise ValueError(f"trainer.num_nodes={nodes}: start this command on every node with {started}")
    # A job of a sweep names its sweep file, which would start the whole sweep again.
    overrides = [*search_path(own_conf_dirs()), *HydraConfig.get().overrides.task, "hydra.mode=RUN"]
    environment = {**os.environ, LAUNCHED: "1"} | ({results.SWEEP_JOB: "1"} if is_sweep_job() else {})
    if code := _finish([*torchrun(trainer.devices), "-m", "firstlab.train", *overrides], environment):
        sys.exit(code)
    return True
