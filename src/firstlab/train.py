"""Train and evaluate one run: `python -m firstlab.train [+experiment=NAME] [KEY=VALUE ...]`, or many: `+sweep=NAME`.

Phase 1 trains the routers, phase 2 LoRA, then every variant is evaluated and result.json is written. The same command
again goes on where an interrupted run was, and does nothing for a finished one.
"""

from __future__ import annotations

from omegaconf import DictConfig

from firstlab.config.command_line import command


def main(composed: DictConfig) -> None:
    """One run, or one of a sweep: there a failure is recorded and the sweep goes on."""
    from firstlab.run.launch import is_sweep_job, isolated

    if is_sweep_job():
        isolated(run, composed)
    else:
        run(composed)


def run(composed: DictConfig) -> None:
    """Run one experiment and, for the table, the dense model on the same settings."""
    from firstlab.config.build import check_device
    from firstlab.run.experiment import Experiment
    from firstlab.run.launch import in_processes, is_sweep_job
    from firstlab.run.load import dense_counterpart, load
    from firstlab.run.report import report

    config, method = load(composed)
    check_device(config.trainer)
    if in_processes(config.trainer):
        return
    experiment = Experiment(config, method)
    # Before the dense run: what is impossible for the method and this model shows here.
    experiment.run()
    if config.compare_with_base and method.name != "none":
        Experiment(*dense_counterpart(config)).run()
    if not is_sweep_job():
        report(experiment)


if __name__ == "__main__":
    command("train", main)
