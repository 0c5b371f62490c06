"""The end of a run as a person sees it: a table of the runs made on the same settings, and a picture."""

from __future__ import annotations

import sys
from pathlib import Path

from firstlab import figures, results
from firstlab.evaluation import rank
from firstlab.experiment import Experiment


def report(experiment: Experiment) -> None:
    """Print the table of this run and its finished neighbours, draw skip_per_layer.png beside them."""
    if rank()[0] > 0:
        return
    record = results.read(experiment.directory)
    if record is None:
        print(f"phases {', '.join(experiment.config.phases)} done in {experiment.directory}")
        return
    records = neighbours(experiment.directory, record)
    rows = [row for each in records for row in results.rows(each)]
    title = f"{record['data']} with {record['model']}, {rows[0]['metrics'][rows[0]['metric']]['n']} test prompts"
    results.print_table(title, rows)
    skipping = [row for row in rows if row["skip"]["skip_rate"] > 0]
    if skipping:
        picture = experiment.directory.parent / "skip_per_layer.png"
        figures.skip_per_layer(skipping, picture, f"Skipped layers: {title}")
        print(f"picture: {picture}")
    print(f"record:  {experiment.directory / results.RESULT}")


def neighbours(directory: Path, record: dict) -> list[dict]:
    """Finished runs beside `directory` on the same model, data, seed and evaluation; the dense one first."""

    def settings(each: dict) -> tuple:
        config = each["config"]
        return config["model"], config["data"], config["evaluation"], each["seed"]

    found = [record]
    for other in sorted(directory.parent.iterdir()):
        hidden = other.name.startswith(".")  # what a run that is starting replaces
        if hidden or not other.is_dir() or other.resolve() == directory.resolve():
            continue
        try:
            candidate = results.read(other)
            if candidate is not None and settings(candidate) == settings(record):
                found.append(candidate)
        except (OSError, ValueError, KeyError, TypeError):
            print(f"note: {other / results.RESULT} is left out: damaged, or of another program", file=sys.stderr)
    return sorted(found, key=lambda each: (each["method"] != "none", each["label"]))
