"""Write every table and figure: `python -m firstlab.tables [scale=llama] [results=[FOLDER,...]] [out=FOLDER]`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from firstlab.config.command_line import command
from firstlab.config.grid import quality_of, tpot_of
from firstlab.store import paper
from firstlab.store.files import check_writable, write_atomically
from firstlab.tables import analysis, any_speed, pictures, printed
from firstlab.tables.cells import BETTER, WORSE, Cells, TablesConfig, load
from firstlab.tables.records import Library, read
from firstlab.tables.table import Table, csv_text, latex, markdown

FORMATS: dict[str, Callable[[Table], str]] = {"md": markdown, "csv": csv_text, "tex": latex}


def build(config: TablesConfig, library: Library) -> list[Table]:
    """Every table, in reading order."""
    cells = Cells(config, library)
    tables = [printed.overview(cells), analysis.equal_rates(cells), analysis.pareto(cells)]
    tables += [printed.quality_table(cells, each) for each in quality_of(config.scale)]
    tables.append(analysis.harness(cells))
    tables += [printed.tpot_table(cells, *each) for each in tpot_of(config.scale).items()]
    tables += [printed.overhead_table(cells), printed.per_layer_table(cells), *printed.figures(cells)]
    if config.scale.ablation_model is not None:
        tables.append(analysis.ablations(cells))
    tables.append(analysis.adaptivity(cells))
    if any(each.node["method"] == "routes" for each in library.records):
        tables += [any_speed.fits(cells), any_speed.any_speed(cells)]
        tables += [table for table in [any_speed.by_part(cells)] if table.rows]  # of mixtures alone
    tables.append(analysis.by_group(cells, "difficulty", "difficulty level", "difficulty"))
    tables.append(analysis.by_group(cells, "length", "prompt tokens", "prompt_tokens"))
    tables += [printed.splits_table(cells), analysis.every_run(cells)]
    order = ("Overview", "Quality", "Speed", "Routing", "Analysis", "Setting", "Quality in detail")
    return sorted(tables, key=lambda table: order.index(table.section))


def write(config: TablesConfig, tables: list[Table], library: Library) -> Path:
    """Write all forms of all tables; return the page."""
    out = Path(config.out)
    for table in tables:
        for ending, form in FORMATS.items():
            write_atomically(out / ending / f"{table.key}.{ending}", form(table))
        picture = out / "svg" / f"{table.key}.svg"
        if table.picture:
            write_atomically(picture, pictures.standalone(table.picture))
        else:
            picture.unlink(missing_ok=True)  # of other results
    shown = [table for table in tables if table.key != "runs"]  # as large as all others together; its files have it
    write_atomically(out / "index.html", page(config, shown, library))
    return out / "index.html"


def page(config: TablesConfig, tables: Sequence[Table], library: Library) -> str:
    """One self-contained HTML page with every table and picture, in the order given."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sections: dict[str, list[Table]] = defaultdict(list)
    for table in tables:
        sections[table.section].append(table)
    template = files("firstlab.tables").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        config=config,
        sections=sections,
        errata=paper.read()["errata"],
        warnings=library.warnings,
        records=sum(each.node["model"] in config.scale.models.values() for each in library.records),
        tables=tables,
        reference=printed.method_title(config.reference),
        better=BETTER,
        worse=WORSE,
    )


def run(config: TablesConfig) -> None:
    """Read, compute, write, say what is filled and what is not."""
    check_writable(Path(config.out), "out")
    library = read(config.results)
    tables = build(config, library)
    index = write(config, tables, library)
    for warning in library.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for table in tables:
        if table.filled or table.missing:
            print(f"{table.key:<12}{table.filled:>5} filled {len(table.missing):>5} without a run")
    commands = {command for table in tables for command in table.commands}
    print(f"{len(library.records)} runs read; {len(commands)} runs would fill the empty cells")
    print(f"page:   {index}")
    print(f"tables: {index.parent}/{{{','.join(FORMATS)},svg}}/")


if __name__ == "__main__":
    command("tables", lambda composed: run(load(composed)), resumes=False)
