"""Hydra's door to `firstlab.sweep`: Hydra accepts plugins from the package `hydra_plugins` only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict


class GridSweeper(Sweeper):
    """Plan a union of grids, then hand the runs that are left to whatever launcher is configured.

    Args:
        grids: Grid name to {override key: value or list of values}; see `firstlab.sweep.expand`.
    """

    def __init__(self, grids: Mapping[str, Mapping[str, Any]]) -> None:
        self.grids = grids

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.context, self.task_function, self.config = hydra_context, task_function, config

    def sweep(self, arguments: list[str]) -> None:
        """Called by Hydra with the command line's overrides."""
        # Hydra imports every plugin at each start, also for --help.
        from hydra.core.plugins import Plugins

        from firstlab.entry import guarded
        from firstlab.sweep import expand, run_sweep

        def compose(overrides: list[str]) -> DictConfig:
            config = self.context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(config):
                del config["hydra"]
            return config

        def run(arguments: list[str]) -> None:
            overrides = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(arguments)
            given = {
                each.get_key_element(): list(each.sweep_string_iterator())
                if each.is_sweep_override()
                else [each.get_value_element_as_str()]
                for each in overrides
            }
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=self.context, task_function=self.task_function, config=self.config
            )
            run_sweep(
                expand(self.grids, given),
                compose=compose,
                launch=lambda jobs: launcher.launch(jobs, initial_job_idx=0),
                settings=self.config.sweep,
                here="Slurm" not in self.config.hydra.launcher._target_,
            )

        guarded(run)(arguments)
