"""Pack the finished runs of run.sh and show what they say: python experiments/smollm2/report.py [RUNS [STUDY]].

STUDY gets records.jsonl.xz, summary.csv, table.md and quality.png; without RUNS tables and picture are made again.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from firstlab.config.grid import ScaleConfig
from firstlab.store import results
from firstlab.store.files import write_atomically
from firstlab.tables.any_speed import any_speed, by_part, fits
from firstlab.tables.cells import Cells, TablesConfig
from firstlab.tables.records import read
from firstlab.tables.table import markdown

STUDY = Path(__file__).resolve().parent
PARTS = {
    "real_mixture": "mixture, mean of the three scores",
    "squad": "questions (SQuAD), F1",
    "cnn_dm": "articles (CNN/DailyMail), ROUGE-L",
    "captions": "captions en→de (Multi30k), BLEU",
}
METHODS = {
    "none": ("dense", "#000000", "*"),
    "routes": ("routes, one adapter for all rates", "#009e73", "o"),
    "one_size": ("routes of one size, PuDDing's rule", "#cc79a7", "P"),
    "sleb": ("SLEB", "#0072b2", "^"),
    "first": ("FiRST", "#d55e00", "s"),
    "first_soft": ("FiRST, paper's form", "#e69f00", "D"),
    "random_skip": ("random layers", "#8c8c8c", "x"),
    "unified_skip": ("unified skip", "#56b4e9", "v"),
}


@dataclass(frozen=True)
class Point:
    """One evaluation of one method; over seeds, their means.

    Attributes:
        part, method: Keys of `PARTS` and `METHODS`.
        asked: The skip rate that was asked for.
        lora: Whether LoRA was trained under the routes.
        rate, rate_by_token: Measured, over prompts and over the references' tokens.
        score, low, high: The part's headline metric with its 95 % interval.
        perplexity: Of the references.
        seeds: How many.
    """

    part: str
    method: str
    asked: float
    lora: bool
    rate: float
    rate_by_token: float
    score: float
    low: float
    high: float
    perplexity: float
    seeds: int = 1


def main() -> None:
    """Read the command line; end with one line where something is wrong."""
    arguments = [Path(each) for each in sys.argv[1:]]
    study = arguments[1] if len(arguments) > 1 else STUDY
    try:
        if arguments:
            pack(arguments[0], study)
        report(study)
    except ValueError as error:
        sys.exit(f"error: {error}")


def pack(runs: Path, study: Path) -> None:
    """Put the records of finished runs into the study, under their run directories' names.

    Raises:
        ValueError: The study has another configuration's record of that name.
    """
    found = {
        f"{file.parents[1].name}--{file.parent.name}": record
        for file, record in results.read_all(runs, print)
        if file.name == results.RESULT  # STUDY may lie inside RUNS
    }
    if not found:
        raise ValueError(f"{runs} holds no finished run")
    study.mkdir(parents=True, exist_ok=True)
    print(f"{len(found)} records: {results.add(study, found)}")


def report(study: Path) -> None:
    """Write tables and picture of the study's records.

    Raises:
        ValueError: There are none.
    """
    points = over_seeds([each for _, record in results.read_all(study, print) for each in points_of(record)])
    if not points:
        raise ValueError(f"{study} holds no records: run.sh makes them")
    text = "\n".join([table(points), *compared(study)])
    write_atomically(study / "table.md", text)
    draw(points, study / "quality.png")
    print(text)


def points_of(record: dict[str, Any]) -> Iterator[Point]:
    """Every evaluation of a run, one for each rate that its router knows.

    Before LoRA those that were tuned only: without it the model does not know the task, whatever it skips.
    """
    method = record["label"].partition("-")[0]  # record["method"] is the same for both forms of FiRST
    if record["data"] not in PARTS or method not in METHODS:
        return
    tuned = "tune" in record["config"].get("steps", [])
    if record["config"]["router"].get("price") == "size":
        method = "one_size"
    for name, variant in record["variants"].items():
        if not tuned and not name.endswith("_lora"):
            continue
        asked = record["config"]["method"].get("target_skip") or 0.0
        rates = {asked: variant} | {float(rate): each for rate, each in variant.get("rates", {}).items()}
        for rate, each in rates.items():
            metric, skip = each["metrics"][each["primary_metric"]], each["skip"]
            yield Point(
                part=record["data"],
                method=method,
                asked=rate,
                lora=name.endswith("_lora"),
                rate=skip["skip_rate"],
                rate_by_token=skip.get("skip_rate_by_token", skip["skip_rate"]),
                score=metric["value"],
                low=metric["low"],
                high=metric["high"],
                perplexity=each.get("perplexity", float("nan")),
            )


def over_seeds(points: Sequence[Point]) -> list[Point]:
    """Means over seeds; the interval's width is that of one seed."""
    groups: dict[tuple[str, str, float, bool], list[Point]] = defaultdict(list)
    for each in points:
        groups[each.part, each.method, each.asked, each.lora].append(each)
    names = ("rate", "rate_by_token", "score", "low", "high", "perplexity")

    def mean(group: list[Point]) -> Point:
        values: dict[str, Any] = {name: fmean(getattr(each, name) for each in group) for name in names}
        return replace(group[0], seeds=len(group), **values)

    return [mean(group) for group in groups.values()]


def table(points: Sequence[Point]) -> str:
    """Markdown: a table for each part."""
    lines = []
    for part, title in PARTS.items():
        own = [each for each in points if each.part == part]
        if not own:
            continue
        lines += [f"**{title[0].upper()}{title[1:]}**", ""]
        lines += ["| | asked | LoRA | skipped, prompts | skipped, tokens | score [95 %] | perplexity | seeds |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        order = list(METHODS)
        for each in sorted(own, key=lambda point: (point.lora, point.asked, order.index(point.method))):
            cells = [METHODS[each.method][0], f"{100 * each.asked:g} %", "yes" if each.lora else "no"]
            cells += [f"{100 * each.rate:.1f} %", f"{100 * each.rate_by_token:.1f} %"]
            cells += [f"{each.score:.1f} [{each.low:.1f}, {each.high:.1f}]", f"{each.perplexity:.4g}", f"{each.seeds}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def compared(study: Path) -> list[str]:
    """Markdown: routes beside SLEB's sets at equal rates over tokens, of the whole and of each part, and their fits."""
    tasks = {"squad": "squad", "cnn_dm": "cnn_dm", "wmt_ende": "captions"}
    scale = ScaleConfig("smollm2", [], {"llama3_8b": "smollm2"}, tasks, {25: 0.25}, methods={"none": [], "first": []})
    config = TablesConfig(scale, [str(study)], str(study), ablation_level=25, resamples=5000)
    cells = Cells(config, read(config.results))
    return [markdown(each) for each in (any_speed(cells), by_part(cells), fits(cells)) if each.rows]


def draw(points: Sequence[Point], file: Path) -> None:
    """Score against the rate over tokens: a row of panels without LoRA, one with it."""
    parts = [part for part in PARTS if any(each.part == part for each in points)]
    fig, axes = plt.subplots(2, len(parts), figsize=(1.6 + 3.2 * len(parts), 6.4), squeeze=False, sharex=True)
    lines = {}
    for column, part in enumerate(parts):
        for row, lora in enumerate((False, True)):
            axis = axes[row, column]
            for method, (label, colour, marker) in METHODS.items():
                own = [each for each in points if (each.part, each.method, each.lora) == (part, method, lora)]
                own.sort(key=lambda each: each.rate_by_token)
                places = [100 * each.rate_by_token for each in own]
                if own:
                    [lines[label]] = axis.plot(places, [each.score for each in own], color=colour, marker=marker)
            axis.grid(alpha=0.3)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
        axes[0, column].set_title(PARTS[part], fontsize=9, loc="left")
        axes[1, column].set_xlabel("layers skipped, over tokens (%)")
    axes[0, 0].set_ylabel("on the tuned model")
    axes[1, 0].set_ylabel("with LoRA trained under the routes")
    across = min(2 * len(parts), 7)
    fig.legend(lines.values(), lines, loc="lower center", ncols=across, fontsize=8, frameon=False)
    fig.tight_layout(rect=(0, 0.03 * -(-len(lines) // across) + 0.02, 1, 1))
    fig.savefig(file, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    main()
