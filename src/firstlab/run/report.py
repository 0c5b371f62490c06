"""Show the end of a run: a table of the runs made on the same settings, and a picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from firstlab.metrics import PRIMARY_METRIC
from firstlab.run.experiment import Experiment
from firstlab.store import results
from firstlab.store.ranks import rank
from firstlab.store.results import ROW_NAMES


def report(experiment: Experiment) -> None:
    """Print the table of this run and its finished neighbours, draw skip_per_layer.png beside them."""
    if rank()[0] > 0:
        return
    if (record := results.read(experiment.directory)) is None:
        print(f"phases {', '.join(experiment.config.phases)} done in {experiment.directory}")
        return
    rows = [row for each in neighbours(experiment.directory, record) for row in rows_of_record(each)]
    title = f"{record['data']} with {record['model']}, {rows[0]['n']} test prompts"
    print_table(title, rows)
    if skipping := [row for row in rows if row["skip"]["skip_rate"] > 0]:
        picture = experiment.directory.parent / "skip_per_layer.png"
        skip_per_layer(skipping, picture, f"Skipped layers: {title}")
        print(f"picture: {picture}")
    for name, variant in record["variants"].items():
        if variant.get("rates"):
            file = experiment.directory / f"quality_by_rate-{name}.png"
            quality_by_rate(variant, file, f"{title}: one model, any rate")
            print(f"picture: {file}")
    print(f"record:  {experiment.directory / results.RESULT}")


def neighbours(directory: Path, record: dict) -> list[dict]:
    """Finished runs beside `directory` on the same model, data, seed and evaluation; the dense one first."""

    def settings(each: dict) -> list:
        return [each["seed"], *(each["config"][key] for key in ("model", "data", "evaluation"))]

    found = [record]
    # A name with a dot is what a run that is starting replaces.
    for other in sorted(each for each in directory.parent.glob("[!.]*") if each.resolve() != directory.resolve()):
        try:
            candidate = results.read(other)
            if candidate is not None and settings(candidate) == settings(record):
                found.append(candidate)
        except (OSError, ValueError):
            print(f"note: {other / results.RESULT} is left out: damaged, or of another program", file=sys.stderr)
    return sorted(found, key=lambda each: (each["method"] != "none", each["label"]))


def rows_of_record(record: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per variant of a run, for tables and pictures: what the record says of both, and warnings."""
    rows = []
    for name, variant in record["variants"].items():
        trained = ("tune", "router", "lora") if name.endswith("_lora") else ("tune", "router")
        said = {phase: ((record.get("phases") or {}).get(phase) or {}).get("warning") for phase in trained}
        warnings = [f"phase {phase}: {warning}" for phase, warning in said.items() if warning]
        metric = variant["metrics"].get(variant["primary_metric"])
        rows.append({**record, **variant, "variant": name, "primary": metric, "warnings": warnings})
        for rate, at in variant.get("rates", {}).items():
            asked = {"level": f"asked {100 * float(rate):g} %", "primary": at["metrics"].get(at["primary_metric"])}
            rows.append({**rows[-1], **at, **asked})
    return rows


def row_title(row: dict[str, Any]) -> str:
    """How a row is called in tables and pictures."""
    tuned = row["variant"] == "router" and (row.get("phases") or {}).get("tune")
    title, details = "Tuned + router" if tuned else ROW_NAMES[row["variant"]], [row.get("note")]
    if row["method"] != "none":
        title = f"{'FiRST' if row['method'] == 'first' else row['method']} {title}"
        details.insert(0, row.get("level"))
    if any(details):
        title += f" ({', '.join(filter(None, details))})"
    return "".join(each if each.isprintable() else "?" for each in title)  # a terminal obeys some of the others


def print_table(title: str, table: Sequence[dict[str, Any]]) -> None:
    """Quality with intervals, skip rate and TPOT ratio side by side."""
    names = list(table[0]["metrics"])
    if any("/" in name for name in names):  # of a mixture the headline alone, of each part as well
        names = [name for name in names if name == "mean" or name.rpartition("/")[2] in PRIMARY_METRIC.values()]
    view = Table(title=title, title_justify="left")
    view.add_column("", no_wrap=True)
    for name in (*names, "skip rate", "by token", "TPOT ratio"):
        view.add_column(name, justify="right")
    for row in table:
        cells = []
        for name in names:
            metric = row["metrics"].get(name)
            interval = f" [{metric['low']:.1f}, {metric['high']:.1f}]" if metric and metric is row["primary"] else ""
            cells.append(f"{metric['value']:.1f}{interval}" if metric else "-")
        for rate in (row["skip"]["skip_rate"], row["skip"].get("skip_rate_by_token")):  # older records lack it
            cells.append("-" if rate is None else f"{100 * rate:.1f} %")
        timing = row.get("timing")
        view.add_row(row_title(row), *cells, f"{timing['tpot_ratio']:.2f}x" if timing else "-")
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False, emoji=False)
    console.print(view)
    if (rates := _rates_by_part(table)) is not None:
        console.print(rates)
    for row in table:
        for warning in row["warnings"]:
            print(f"warning: {row_title(row)}: {warning}")


def _rates_by_part(table: Sequence[dict[str, Any]]) -> Table | None:
    """What each part of a mixture pays, beside its scores: skip rates over prompts and over tokens."""
    shown = {row_title(row): row["skip"].get("by_part") for row in table if row["skip"]["skip_rate"] > 0}
    parts = list(dict.fromkeys(part for found in shown.values() for part in found or {}))
    if not parts:
        return None
    view = Table(title="Skip rate by part: over prompts, over tokens", title_justify="left")
    view.add_column("", no_wrap=True)
    for part in parts:
        view.add_column(part, justify="right")

    def cell(group: dict[str, Any]) -> str:
        rates = (group.get("skip_rate"), group.get("skip_rate_by_token"))  # older records lack the second
        return ", ".join("-" if rate is None else f"{100 * rate:.1f} %" for rate in rates)

    for title, found in shown.items():
        view.add_row(title, *(cell((found or {}).get(part, {})) for part in parts))
    return view


def skip_per_layer(rows: Sequence[dict[str, Any]], file: Path, title: str) -> None:
    """Draw the share of prompts that skip each layer as bars, one panel per row of `rows_of_record`, into a PNG."""
    fig = Figure(figsize=(9, 1.2 + 1.5 * len(rows)), layout="tight")
    axes = fig.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    for axis, row in zip(axes, rows, strict=True):
        skip, count = row["skip"], row["skip"].get("unique_routes", 0)
        layers = range(len(skip["per_layer"]))
        axis.bar(layers, [100 * share for share in skip["per_layer"]], color="#3b6ea5", zorder=2)
        axis.set(ylim=(0, 100), yticks=[0, 50, 100], xticks=layers[:: max(1, len(layers) // 32)])
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        said = f"{100 * skip['skip_rate']:.1f} % of layers skipped, {count} {'route' if count == 1 else 'routes'}"
        score = f"{row['primary_metric']} {row['primary']['value']:.1f}"
        axis.set_title(f"{row_title(row)}: {said}, {score}", fontsize=9, loc="left", parse_math=False)
    axes[-1].set_xlabel("decoder layer (0 = first)")
    fig.supylabel("prompts that skip the layer (%)", fontsize=10)
    fig.suptitle(title, fontsize=11, parse_math=False)
    fig.savefig(file, dpi=130)


def quality_by_rate(variant: dict[str, Any], file: Path, title: str) -> None:
    """Draw a variant's headline score, with intervals, over the skip rates that it was evaluated at, into a PNG."""
    points = sorted((variant, *variant["rates"].values()), key=lambda each: each["skip"]["skip_rate_by_token"])
    rates = [100 * each["skip"]["skip_rate_by_token"] for each in points]
    scores = [each["metrics"][variant["primary_metric"]] for each in points]
    spread = [[each["value"] - each["low"] for each in scores], [each["high"] - each["value"] for each in scores]]
    fig = Figure(figsize=(7, 4), layout="tight")
    axis = fig.subplots()
    axis.errorbar(rates, [each["value"] for each in scores], spread, marker="o", capsize=3, color="#3b6ea5")
    axis.set(xlabel="layers skipped, mean over decoded tokens (%)", ylabel=variant["primary_metric"])
    axis.grid(alpha=0.3)
    axis.set_title(title, fontsize=10)
    fig.savefig(file, dpi=130)
