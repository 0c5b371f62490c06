"""Routers over whole routes: what their fits found, and one checkpoint at several rates beside static sets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from firstlab.metrics import PRIMARY_METRIC, PairedTest, Scores, bootstrap_interval, from_rows, paired_test
from firstlab.store import results
from firstlab.tables.cells import Cells
from firstlab.tables.printed import method_title
from firstlab.tables.records import Record
from firstlab.tables.table import LORA, Cell, Table, columns, interval, number, percent

STATIC = "sleb"
#: What a fit says, see `firstlab.training.route_fit.fit_router`.
_NUMBERS = {"prompts", "routes", "routes_used", "harm_r2", "length_r2", "skip_rate_by_token", "dense_loss"}
_NUMBERS |= {"static_loss", "routed_loss", "gain", "predicted_harm", "measured_harm", "worth"}
#: Rates that are nearer to each other count as equal.
_SAME_RATE = 0.0025


@dataclass(frozen=True, eq=False)
class Point:
    """One rate that was asked of one trained router, the parts of its records by seed."""

    data: str
    lora: bool
    asked: float
    parts: dict[int, dict[str, Any]]
    trained: str  # what a static set must share to be compared: model, data, steps

    def of(self, seeds: Iterable[int]) -> Point:
        """With these seeds only."""
        return Point(self.data, self.lora, self.asked, {seed: self.parts[seed] for seed in sorted(seeds)}, self.trained)

    def mean(self, key: str) -> float:
        """Mean over seeds of a skip rate: "skip_rate" or "skip_rate_by_token"."""
        return fmean(part["skip"][key] for part in self.parts.values())

    @property
    def scores(self) -> list[Scores]:
        """The headline metric per test prompt, of each seed."""
        return [_scores(part) for part in self.parts.values()]


def fits(cells: Cells) -> Table:
    """What each fit of a route router says of itself on held-out prompts."""
    heads = columns("Task", "Seed", "Step", "Prompts", "Price")
    heads += columns("in all", "used", group="routes")
    heads += columns("harm", "length", group="R², held out")
    heads += columns("skip, over tokens", "dense", "static sets", "routed", "gain", group="loss, held out")
    heads += columns("predicted", "measured", group="harm of the chosen")
    rows = []
    for record in _routed(cells):
        for step in ("router", "refit"):
            found = record.node.get("phases", {}).get(step)
            if found and all(isinstance(found.get(name), int | float) for name in _NUMBERS):
                row = [Cell(record.node["data"]), Cell(str(record.seed), record.seed)]
                row += [Cell("choose" if step == "router" else step), number(found["prompts"], ".0f")]
                row += [
                    Cell(str(found.get("price"))),
                    number(found["routes"], ".0f"),
                    number(found["routes_used"], ".0f"),
                ]
                row += [number(found["harm_r2"], ".2f"), number(found["length_r2"], ".2f")]
                row.append(percent(found["skip_rate_by_token"]))
                row += [number(found[name], ".4f") for name in ("dense_loss", "static_loss", "routed_loss")]
                gain, (low, high) = found["gain"], found.get("gain_interval", (None, None))
                mark = "" if found["worth"] else "static set used"
                row.append(Cell(f"{gain:+.4f}", gain, interval(low, high, "+.4f"), mark, kind="ours"))
                rows.append([*row, *(number(found[name], ".4f") for name in ("predicted_harm", "measured_harm"))])
    caption = (
        "One row per fit. R² is the share of a route's cost, and of the response's length, that the prompt tells. The "
        "gain is against static sets at the same rate over tokens; where its interval holds 0, every prompt gets the "
        "static set."
    )
    return Table("route_fits", "Route routers: what their fits found", heads, rows, caption, section="Routing")


def any_speed(cells: Cells) -> Table:
    """One checkpoint at every rate that was asked of it, beside static sets at the same rate over tokens."""
    heads = columns("Task", "LoRA", "Asked", "skip", "skip, over tokens", "Seeds", "Score")
    heads += columns("score", "difference", "p", group=f"{method_title(STATIC)} at that rate")
    statics = [each for record in cells.library.records for each in _points(record) if record.node["method"] == STATIC]
    fixed = _over_seeds(statics)
    rows = []
    for point in _over_seeds(each for record in _routed(cells) for each in _points(record)):
        low, high = bootstrap_interval(Scores.average(point.scores), confidence=cells.config.confidence)
        value = Scores.average(point.scores).value
        row = [Cell(point.data), LORA[point.lora], percent(point.asked), percent(point.mean("skip_rate"))]
        row += [percent(point.mean("skip_rate_by_token")), Cell(str(len(point.parts)), len(point.parts))]
        row.append(Cell(f"{value:.1f}", value, interval(low, high), kind="ours"))
        found = compare(point, fixed, cells.config.resamples)
        if found is None:
            rows.append([*row, Cell(note="no static sets of the same training next to this rate"), Cell(), Cell()])
        else:
            static, test = found
            detail = interval(test.low, test.high, "+.1f")
            row += [number(static), Cell(f"{test.difference:+.1f}", test.difference, detail, kind="ours")]
            rows.append([*row, number(test.p_value, ".3g")])
    caption = (
        "One router and, with LoRA, one adapter for all rates. Static sets have an adapter of their own for each rate, "
        "trained for as many steps; between two sizes a share of the prompts gets the larger set."
    )
    return Table("any_speed", "One checkpoint at any rate", heads, rows, caption, section="Analysis")


def compare(point: Point, statics: list[Point], resamples: int) -> tuple[float, PairedTest] | None:
    """The static sets' score at the point's rate over tokens, and the paired test; None without sets next to it.

    What is compared is the seeds that all have.
    """
    near = [each for each in statics if each.trained == point.trained and each.lora == point.lora]
    rate = point.mean("skip_rate_by_token")
    below = max((x for x in near if x.asked <= rate + _SAME_RATE), key=lambda each: each.asked, default=None)
    above = min((x for x in near if x.asked >= rate - _SAME_RATE), key=lambda each: each.asked, default=None)
    if below is None or above is None:
        return None
    shared = point.parts.keys() & below.parts.keys() & above.parts.keys()
    if not shared:
        return None
    ours, less, more = (each.of(shared) for each in (point, below, above))
    gap = more.asked - less.asked
    share = min(max((ours.mean("skip_rate_by_token") - less.asked) / gap, 0.0), 1.0) if gap > 0 else 0.0
    theirs = Scores.average([Scores.blend(a, b, share) for a, b in zip(less.scores, more.scores, strict=True)])
    return theirs.value, paired_test(Scores.average(ours.scores), theirs, resamples=resamples)


def _scores(part: dict[str, Any]) -> Scores:
    """The headline metric; of a mixture, the mean of its parts' headline metrics."""
    rows = part["examples"]["scores"]
    if part["primary_metric"] in rows:
        return from_rows(part["primary_metric"], results.unpack(rows[part["primary_metric"]]))
    headlines = [name for name in rows if name.rpartition("/")[2] in PRIMARY_METRIC.values()]
    return Scores.mixture([from_rows(name, results.unpack(rows[name])) for name in headlines])


def _routed(cells: Cells) -> list[Record]:
    models = set(cells.scale.models.values())
    found = [r for r in cells.library.records if r.node["method"] == "routes" and r.node["model"] in models]
    return sorted(found, key=lambda record: (record.node["data"], record.seed))


def _points(record: Record) -> Iterator[Point]:
    """Every rate at which a record's variants were evaluated; a static set's rate is the one it has."""
    config = record.node["config"]
    shared = {name: config[name] for name in ("model", "data", "lora_phase", "lora")}
    trained = json.dumps({**shared, "tuned": "tune" in config.get("steps", [])}, sort_keys=True)
    for name, variant in record.node["variants"].items():
        if name.startswith("router"):
            skip, asked = variant["skip"], config["method"]["target_skip"]
            rate = skip["skip_rate"] if record.node["method"] == STATIC else asked
            parts = {rate: variant} | {float(key): part for key, part in variant.get("rates", {}).items()}
            for rate, part in parts.items():
                if part.get("examples", {}).get("scores") and "skip_rate_by_token" in part["skip"]:
                    yield Point(record.node["data"], name.endswith("lora"), rate, {record.seed: part}, trained)


def _over_seeds(points: Iterable[Point]) -> list[Point]:
    """Points of several seeds as one, where data, training, rate and test set are the same."""
    groups: dict[Any, dict[int, dict[str, Any]]] = defaultdict(dict)
    for point in points:
        [(seed, part)] = point.parts.items()
        key = point.data, point.lora, round(point.asked, 4), point.trained, part["examples"].get("test_set")
        groups[key].setdefault(seed, part)
    return [
        Point(data, lora, asked, dict(sorted(groups[key].items())), trained)
        for key in sorted(groups, key=str)
        for data, lora, asked, trained, _ in [key]
    ]
