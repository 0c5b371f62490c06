"""Tables of recorded results, from result files alone: no model, no data, seconds.

python -m firstlab.tables                 # experiments/*/results/*.json
python -m firstlab.tables FOLDER [...]    # every result.json or recorded result below the folders
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from firstlab import results
from firstlab.entry import guarded


def read_records(folders: list[Path]) -> list[dict[str, Any]]:
    """All finished runs below the folders, in the order of their paths.

    Raises:
        ValueError: A folder is missing, or a result file is not one of ours.
    """
    records = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give folders with result files, e.g. experiments or runs")
        for file in sorted({*folder.rglob("results/*.json"), *folder.rglob(results.RESULT)}):
            record = json.loads(file.read_text(encoding="utf-8"))
            if "variants" not in record:
                raise ValueError(f"{file} is not a result file of firstlab.train")
            records.append(record)
    return records


def markdown(records: list[dict[str, Any]]) -> str:
    """One Markdown table per model and task: every metric, the headline metric with its interval, skip rate, TPOT."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["model"], record["data"]] += results.rows(record)
    parts = []
    for (model, data), rows in sorted(groups.items()):
        rows.sort(key=lambda row: (row["method"] != "none", row["label"]))
        names = list(rows[0]["metrics"])
        header = ["", *names, "skip rate", "TPOT ratio"]
        lines = [f"### {data}, {model}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        for row in rows:
            cells = [results.row_title(row)]
            for name in names:
                metric = row["metrics"][name]
                interval = f" [{metric['low']:.1f}, {metric['high']:.1f}]" if name == row["metric"] else ""
                cells.append(f"{metric['value']:.1f}{interval}")
            cells.append(f"{100 * row['skip']['skip_rate']:.1f} %")
            cells.append(f"{row['timing']['tpot_ratio']:.2f}" if row["timing"] else "-")
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


@guarded
def main(arguments: list[str]) -> None:
    """Read, print."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    records = read_records([Path(each) for each in arguments or ["experiments"]])
    if not records:
        raise ValueError(f"no finished runs below {', '.join(arguments or ['experiments'])}; run firstlab.train first")
    print(markdown(records))


if __name__ == "__main__":
    main(sys.argv[1:])
