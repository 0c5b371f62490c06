"""Show the end of a run: a table of the runs made on the same settings, and a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firstlab.run.experiment import Experiment
from firstlab.store import results
from firstlab.store.ranks import rank
from firstlab.store.results import ROW_NAMES


def report(experiment: Experiment) -> None:
    """Print the table of this run and its finished neighbours, draw skip_per_layer.png beside them."""
    if rank()[0] > 0:
        return
    record = results.read(experiment.directory)
    if record is None:
        print(f"phases {', '.join(experiment.config.phases)} done in {experiment.directory}")
        return
    records = neighbours(experiment.directory, record)
    rows = [row for each in records for row in rows_of_record(each)]
    title = f"{record['data']} with {record['model']}, {rows[0]['metrics'][rows[0]['metric']]['n']} test prompts"
    print_table(title, rows)
    skipping = [row for row in rows if row["skip"]["skip_rate"] > 0]
    if skipping:
        picture = experiment.directory.parent / "skip_per_layer.png"
        skip_per_layer(skipping, picture, f"Skipped layers: {title}")
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
                rows_of_record(candidate)
                found.append(candidate)
        except (OSError, ValueError, KeyError, TypeError):
            print(f"note: {other / results.RESULT} is left out: damaged, or of another program", file=sys.stderr)
    return sorted(found, key=lambda each: (each["method"] != "none", each["label"]))


def rows_of_record(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One flat row per variant of a run, for tables."""
    found = []
    for name, variant in record["variants"].items():
        primary = variant["primary_metric"]
        found.append(
            {
                "variant": name,
                "method": record["method"],
                "label": record["label"],
                "level": record["level"],
                "note": record.get("note"),
                "metric": primary,
                "metrics": variant["metrics"],
                "perplexity": variant.get("perplexity"),
                "skip": variant["skip"],
                "timing": variant.get("timing"),
                "warnings": _warnings(record, name),
                "directory": record["directory"],
            }
        )
    return found


def _warnings(record: dict[str, Any], variant: str) -> list[str]:
    """What went wrong in the phases that made a variant."""
    trained = ("router", "lora") if variant.endswith("_lora") else ("router",)
    phases = {name: (record.get("phases") or {}).get(name) or {} for name in trained}
    return [f"phase {name}: {phase['warning']}" for name, phase in phases.items() if phase.get("warning")]


def row_title(row: dict[str, Any]) -> str:
    """How a row is called in tables and pictures."""
    dense = row["method"] == "none"
    name = "FiRST" if row["method"] == "first" else row["method"]
    title = ROW_NAMES[row["variant"]] if dense else f"{name} {ROW_NAMES[row['variant']]}"
    details = [each for each in ("" if dense else row["level"], row["note"]) if each]
    title = f"{title} ({', '.join(details)})" if details else title
    return "".join(each if each.isprintable() else "?" for each in title)  # a terminal obeys some of the others


def print_table(title: str, table: Sequence[dict[str, Any]]) -> None:
    """Quality with intervals, skip rate and TPOT ratio side by side."""
    from rich.console import Console
    from rich.table import Table

    names = list(table[0]["metrics"])
    view = Table(title=title, title_justify="left")
    view.add_column("", no_wrap=True)
    for name in names:
        view.add_column(name, justify="right")
    for name in ("skip rate", "by token", "TPOT ratio"):
        view.add_column(name, justify="right")
    for row in table:
        cells = []
        for name in names:
            metric = row["metrics"].get(name)
            interval = f" [{metric['low']:.1f}, {metric['high']:.1f}]" if metric and name == row["metric"] else ""
            cells.append(f"{metric['value']:.1f}{interval}" if metric else "-")
        by_token = row["skip"].get("skip_rate_by_token")  # older records lack it
        cells += [f"{100 * row['skip']['skip_rate']:.1f} %", "-" if by_token is None else f"{100 * by_token:.1f} %"]
        timing = row["timing"]
        cells.append(f"{timing['tpot_ratio']:.2f}x" if timing else "-")
        view.add_row(row_title(row), *cells)
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
    console.print(view)
    for row in table:
        for warning in row["warnings"]:
            print(f"warning: {row_title(row)}: {warning}")


def skip_per_layer(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Bars of the share of prompts that skip each layer, one panel per row of `rows_of_record`.

    Args:
        rows: Variants with any skipping.
        file: PNG to write.
        title: Of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    fig, axes = plt.subplots(len(rows), 1, figsize=(9, 1.2 + 1.5 * len(rows)), sharex=True, squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        shares = 100 * np.array(row["skip"]["per_layer"])
        layers = np.arange(len(shares))
        axis.bar(layers, shares, color="#3b6ea5", width=0.8)
        axis.set_ylim(0, 100)
        axis.set_yticks([0, 50, 100])
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        metric = row["metrics"][row["metric"]]["value"]
        routes = row["skip"]["unique_routes"]
        axis.set_title(
            f"{row_title(row)}: {100 * row['skip']['skip_rate']:.1f} % of layers skipped, "
            f"{row['metric']} {metric:.1f}, {routes} {'route' if routes == 1 else 'routes'}",
            fontsize=9,
            loc="left",
            parse_math=False,
        )
    step = max(1, len(layers) // 32)
    axes[-1, 0].set_xticks(layers[::step])
    axes[-1, 0].set_xlabel("decoder layer (0 = first)")
    fig.supylabel("prompts that skip the layer (%)", fontsize=10)
    fig.suptitle(title, fontsize=11, parse_math=False)
    fig.tight_layout()
    fig.savefig(file, dpi=130)
    plt.close(fig)
