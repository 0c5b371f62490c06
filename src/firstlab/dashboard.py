"""Save a W&B workspace of the runs, built from code.

python -m firstlab.dashboard entity=USER_OR_TEAM [project=firstlab] [name=TITLE]   # needs `wandb login`
python -m firstlab.dashboard dry_run=dashboard.json    # write what it would save: no login, no network
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstlab.config.command_line import guarded, parse_options
from firstlab.store.files import write_atomically
from firstlab.store.results import ROW_NAMES

QUALITY = ("bleu1", "bleu2", "bleu", "chrf", "comet", "rouge1", "rougeL", "rougeLsum", "bertscore", "em", "f1")
CURVES = {"training loss": "train/loss", "validation loss": "val/cross_entropy", "skip rate": "val/skip_rate"}


@dataclass
class DashboardOptions:
    """Command line."""

    entity: str | None = None
    project: str = "firstlab"  # the one that conf/logger/wandb.yaml writes to
    name: str = "Layer skipping: quality, skip rate, speed"
    dry_run: str | None = None


def specification(name: str) -> dict[str, Any]:
    """Sections and panels; every metric is one that `firstlab.run.loggers` or the training modules log."""

    def panels(kind: str, metrics: dict[str, list[str]]) -> list[dict[str, Any]]:
        return [{"kind": kind, "title": title, "metrics": names} for title, names in metrics.items()]

    def tested(*keys: str) -> list[dict[str, Any]]:
        return panels("bar", {key.replace("_", " "): [f"test/{row}/{key}" for row in ROW_NAMES] for key in keys})

    curves = {title: [f"{phase}/{key}" for phase in ("router", "lora")] for title, key in CURVES.items()}
    sections = [
        {"name": "Quality", "panels": tested(*QUALITY)},
        {"name": "Skip rate and speed", "panels": tested("skip_rate", "tpot_ratio", "perplexity")},
        {"name": "Training", "panels": panels("line", curves)},
    ]
    return {"name": name, "group_by": ["group", "job_type"], "sections": sections}


def workspace(spec: dict[str, Any], entity: str, project: str) -> Any:
    """The specification as a `wandb_workspaces` workspace, not yet saved; ValueError without that package."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise ValueError(f"{error}: install it with pip install 'firstlab[dashboard]', or use dry_run=FILE") from error

    def panel(kind: str, title: str, metrics: Any) -> Any:
        if kind == "bar":
            return wr.BarPlot(title=title, metrics=metrics)
        return wr.LinePlot(title=title, x="Step", y=metrics)

    sections = [
        ws.Section(name=each["name"], panels=[panel(**node) for node in each["panels"]], is_open=True)
        for each in spec["sections"]
    ]
    runs = ws.RunsetSettings(groupby=[ws.Metric(key) for key in spec["group_by"]])
    return ws.Workspace(entity=entity, project=project, name=spec["name"], sections=sections, runset_settings=runs)


@guarded
def main(arguments: list[str]) -> None:
    """Write the specification, or save the workspace."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    options, words = parse_options(DashboardOptions(), arguments)
    if words:
        raise ValueError(f"{words[0]!r} is not an option; use entity=, project=, name= or dry_run=")
    spec = specification(options.name)
    if options.dry_run is not None:
        saved = {"entity": options.entity, "project": options.project, **spec}
        write_atomically(Path(options.dry_run), json.dumps(saved, indent=2) + "\n")
        print(f"specification: {options.dry_run}")
        return
    if options.entity is None:
        raise ValueError("entity is not set; give your W&B user or team with entity=NAME, or use dry_run=FILE")
    built = workspace(spec, options.entity, options.project)
    from wandb.errors import Error

    try:
        built.save()
    except Error as error:
        raise ValueError(f"W&B: {error}") from error
    print(f"workspace: {built.url}")


if __name__ == "__main__":
    main(sys.argv[1:])
