"""Hydra's door to `firstlab.run.sweep`: Hydra accepts plugins from the package `hydra_plugins` only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


class GridSweeper(Sweeper):
    """Plan a union of grids, then hand the runs that are left to whatever launcher is configured.

    Args:
        scale: A file of conf/scale, or nothing.
        cells: Name to what is wanted of the scale's grid; see `firstlab.config.grid.CellsConfig`.
        grids: Grid name to {override key: value or list of values}; see `firstlab.run.sweep.expand`.
    """

    config: DictConfig

    def __init__(
        self, scale: DictConfig, cells: Mapping[str, DictConfig], grids: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.scale, self.cells, self.grids = scale, cells, grids

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        from firstlab.config.compose import expand_home

        with read_write(config.hydra):
            expand_home(config)
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra with the command line's overrides."""
        # Hydra imports every plugin at each start, also for --help.
        from firstlab.config.command_line import guarded

        guarded(self._sweep)(arguments)

    def _compose(self, overrides: list[str]) -> DictConfig:
        from firstlab.config.compose import refuse_misread

        config = self.context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            del config["hydra"]
        refuse_misread(config, overrides)
        return config

    def _fitting(self, overrides: list[str]) -> tuple[str, ...]:
        """Without those of sweep.optional that the run's method does not have."""
        optional = [each for each in overrides if each.partition("=")[0] in self.config.sweep.optional]
        if not optional:
            return tuple(overrides)
        known = self._compose([each for each in overrides if each not in optional])
        return tuple(x for x in overrides if x not in optional or _has(known, x.partition("=")[0]))

    def _sweep(self, arguments: list[str]) -> None:
        from hydra.core.plugins import Plugins

        from firstlab.run.sweep import expand, run_sweep, with_cells

        given = {
            each.get_key_element(): list(each.sweep_string_iterator())
            if each.is_sweep_override()
            else [each.get_value_element_as_str()]
            for each in OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(arguments)
        }
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=self.task_function, config=self.config
        )
        on_slurm = "Slurm" in self.config.hydra.launcher._target_
        launch = partial(_launch_on_slurm if on_slurm else _launch, launcher)
        # Without an optional key, runs may be the same.
        fitting = dict.fromkeys(map(self._fitting, expand(with_cells(self.scale, self.cells, self.grids), given)))
        runs = [list(run) for run in fitting]
        run_sweep(runs, compose=self._compose, launch=launch, settings=self.config.sweep, here=not on_slurm)


def _has(config: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    return OmegaConf.is_dict(node) and name in node


def _launch(launcher: Launcher, jobs: list[list[str]]) -> None:
    launcher.launch(jobs, initial_job_idx=0)


def _launch_on_slurm(launcher: Any, jobs: list[list[str]]) -> None:
    folder = launcher.params["submitit_folder"]
    earlier = _submitted(folder)
    try:
        _launch(launcher, jobs)
    except Exception:
        # submitit raises at the first job that is lost (killed, out of memory) while others wait or run.
        if others := _submitted(folder) - earlier:
            _wait_for(others)
        raise


def _submitted(folder: str) -> set[Path]:
    """What submitit wrote of each job that it handed to SLURM."""
    pattern = Path(folder) / "*_submitted.pkl"
    return {Path(file) for file in glob(str(pattern).replace("%j", "*"))}


def _wait_for(submitted: set[Path]) -> None:
    import submitit

    print(f"SLURM lost a job; waiting for the others of {len(submitted)}", file=sys.stderr, flush=True)
    for file in submitted:
        submitit.SlurmJob(file.parent, file.name.removesuffix("_submitted.pkl")).wait()
