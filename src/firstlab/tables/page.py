"""Write one self-contained page with every table and picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from firstlab.store import paper
from firstlab.tables.cells import BETTER, WORSE
from firstlab.tables.config import TablesConfig
from firstlab.tables.quality import method_title
from firstlab.tables.records import Library
from firstlab.tables.table import Table


def render(config: TablesConfig, tables: Sequence[Table], library: Library) -> str:
    """HTML text with the tables in the order given."""
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
        filled=sum(table.filled for table in tables),
        missing=sum(len(table.missing) for table in tables),
        reference=method_title(config.reference),
        better=BETTER,
        worse=WORSE,
    )
