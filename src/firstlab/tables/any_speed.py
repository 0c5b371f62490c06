"""Routers over whole routes: what their fits found, and one checkpoint at several rates beside static sets."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
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
#: Settings of the LoRA phase that say how long it is.
_LENGTHS = ("epochs", "max_steps", "validate_every", "checkpoint_every")


@dataclass(frozen=True, eq=False)
class Point:
    """One rate that was asked of one trained router, the parts of its records by seed."""

    data: str
    title: str  # of the method
    settings: str  # of method and routers, but for the rate
    lora: bool
    asked: float
    parts: dict[int, dict[str, Any]]
    trained: str  # model, data, LoRA and steps
    comparable: str  # the same, whatever the order of as many steps: what a static set must share to be compared

    def of(self, seeds: Iterable[int]) -> Point:
        """With these seeds only."""
        return replace(self, parts={seed: self.parts[seed] for seed in sorted(seeds)})

    def mean(self, key: str, name: str = "") -> float | None:
        """Mean over seeds of "skip_rate" or "skip_rate_by_token"; of one part of a mixture, if a `name` is given.

        None where a record lacks it.
        """
        skips = [part["skip"] for part in self.parts.values()]
        found = [(skip["by_part"][name] if name else skip).get(key) for skip in skips]
        return None if None in found else fmean(found)

    def scores(self, name: str = "") -> list[Scores]:
        """The headline metric per test prompt, of each seed; of one part of a mixture, if a `name` is given."""
        return [_scores(part, name) for part in self.parts.values()]


def fits(cells: Cells) -> Table:
    """What each fit of a route router says of itself on held-out prompts."""
    heads = columns("Task", "Method", "Seed", "Step", "Prompts", "Price")
    heads += columns("in all", "used", group="routes")
    heads += columns("harm", "length", group="R², held out")
    heads += columns(
        "skip, over tokens", "dense", "static sets", "routed", "gain", "of what they add", group="loss, held out"
    )
    heads += columns("predicted", "measured", group="harm of the chosen")
    rows = []
    for record in _routed(cells):
        for step in ("router", "refit"):
            found = record.node.get("phases", {}).get(step)
            if found and all(isinstance(found.get(name), int | float) for name in _NUMBERS):
                row = [Cell(record.node["data"]), Cell(_title(record)), Cell(str(record.seed), record.seed)]
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
                added = found["static_loss"] - found["dense_loss"]
                row.append(percent(-gain / added if added > 0 else None, ".0f"))
                rows.append([*row, *(number(found[name], ".4f") for name in ("predicted_harm", "measured_harm"))])
    caption = (
        "One row per fit. R² is the share of a route's cost, and of the response's length, that the prompt tells. The "
        "gain is against static sets at the same rate over tokens, also as a share of the loss that they add to that "
        "of the dense model; where its interval holds 0, every prompt gets the static set."
    )
    return Table("route_fits", "Route routers: what their fits found", heads, rows, caption, section="Routing")


def any_speed(cells: Cells) -> Table:
    """One checkpoint at every rate that was asked of it, beside static sets at the same rate over tokens."""
    heads = columns("Task", "Method", "LoRA", "Asked", "skip", "skip, over tokens", "Seeds", "Score")
    heads += columns("score", "difference", "p", group=f"{method_title(STATIC)} at that rate")
    rows, fixed = [], _static(cells)
    for point in _over_seeds(each for record in _routed(cells) for each in _points(record)):
        row = [Cell(point.data), Cell(point.title), LORA[point.lora], percent(point.asked)]
        row += [percent(point.mean(key)) for key in ("skip_rate", "skip_rate_by_token")]
        rows.append([*row, Cell(str(len(point.parts)), len(point.parts)), *_scored(cells, point, fixed)])
    caption = (
        "One router and, with LoRA, one adapter for all rates. Static sets have an adapter of their own for each rate, "
        "trained for as many steps; between two sizes a share of the prompts gets the larger set. PuDDing's rule takes "
        "the set of least predicted harm among those of one size."
    )
    return Table("any_speed", "One checkpoint at any rate", heads, rows, caption, section="Analysis")


def by_part(cells: Cells) -> Table:
    """What each part of a mixture pays and gets: its rates and score, beside static sets at the same rate overall."""
    heads = columns("Task", "Method", "LoRA", "Asked", "Part", "skip", "skip, over tokens", "Score")
    heads += columns("score", "difference", "p", group=f"{method_title(STATIC)} at the rate of the whole")
    rows, fixed = [], _static(cells)
    for point in _over_seeds(each for record in _routed(cells) for each in _points(record)):
        for name in sorted(set.intersection(*(set(part["skip"].get("by_part", {})) for part in point.parts.values()))):
            row = [Cell(point.data), Cell(point.title), LORA[point.lora], percent(point.asked), Cell(name)]
            row += [percent(point.mean(key, name)) for key in ("skip_rate", "skip_rate_by_token")]
            rows.append([*row, *_scored(cells, point, fixed, name)])
    caption = (
        "A router may let one part of a mixture pay for the others: here is what each part skips and scores. Static "
        "sets skip alike in all parts, at the rate over tokens of the whole mixture. router.max_harm bounds what a "
        "prompt may lose."
    )
    return Table("by_part", "One checkpoint, part by part", heads, rows, caption, section="Analysis")


def _scored(cells: Cells, point: Point, fixed: list[Point], name: str = "") -> list[Cell]:
    """A point's score with its interval, and the comparison with static sets; of one part, if a `name` is given."""
    mean = Scores.average(point.scores(name))
    low, high = bootstrap_interval(mean, confidence=cells.config.confidence)
    score = Cell(f"{mean.value:.1f}", mean.value, interval(low, high), kind="ours")
    found = compare(point, fixed, cells.config.resamples, name)
    if found is None:
        return [score, Cell(note="no static sets of the same training next to this rate"), Cell(), Cell()]
    static, test, seeds = found
    detail = interval(test.low, test.high, "+.1f")
    if seeds < point.parts.keys():  # what is subtracted is then not what stands beside it
        detail += f" seeds {', '.join(map(str, sorted(seeds)))}"
    difference = Cell(f"{test.difference:+.1f}", test.difference, detail, kind="ours")
    return [score, number(static), difference, number(test.p_value, ".3g")]


def compare(
    point: Point, statics: list[Point], resamples: int, name: str = ""
) -> tuple[float, PairedTest, set[int]] | None:
    """The static sets' score at the point's rate over tokens, and the paired test; None without sets next to it.

    What is compared is the seeds that all have, which are the third.
    """
    near = [each for each in statics if each.comparable == point.comparable and each.lora == point.lora]
    for trained in sorted({each.trained for each in near}, key=lambda own: (own != point.trained, own)):
        if (found := _beside(point, [each for each in near if each.trained == trained], resamples, name)) is not None:
            return found
    return None


def _beside(point: Point, near: list[Point], resamples: int, name: str) -> tuple[float, PairedTest, set[int]] | None:
    rate = point.mean("skip_rate_by_token")
    assert rate is not None
    below = max((x for x in near if x.asked <= rate + _SAME_RATE), key=lambda each: each.asked, default=None)
    above = min((x for x in near if x.asked >= rate - _SAME_RATE), key=lambda each: each.asked, default=None)
    if below is None or above is None:
        return None
    shared = point.parts.keys() & below.parts.keys() & above.parts.keys()
    if not shared:
        return None
    ours, less, more = (each.of(shared) for each in (point, below, above))
    gap, own = more.asked - less.asked, ours.mean("skip_rate_by_token") or 0.0
    share = min(max((own - less.asked) / gap, 0.0), 1.0) if gap > 0 else 0.0
    pairs = zip(less.scores(name), more.scores(name), strict=True)
    theirs = Scores.average([Scores.blend(a, b, share) for a, b in pairs])
    return theirs.value, paired_test(Scores.average(ours.scores(name)), theirs, resamples=resamples), shared


def _scores(part: dict[str, Any], name: str = "") -> Scores:
    """The headline metric, of one part of a mixture if a `name` is given; of all, the mean of the parts' metrics."""
    rows = part["examples"]["scores"]
    if not name and part["primary_metric"] in rows:
        return from_rows(part["primary_metric"], results.unpack(rows[part["primary_metric"]]))
    headlines = [key for key in rows if key.rpartition("/")[2] in PRIMARY_METRIC.values()]
    chosen = [key for key in headlines if not name or key.rpartition("/")[0] == name]
    return Scores.mixture([from_rows(key, results.unpack(rows[key])) for key in chosen])


def _title(record: Record) -> str:
    """How a record's method is called, with what makes it another one."""
    config = record.node["config"]
    if record.node["method"] != "routes":
        return method_title(record.node["method"])
    router, method = config["router"], config["method"]
    said = ["PuDDing's rule: routes of one size, no price" if router.get("price") == "size" else "routes"]
    if router.get("max_harm") is not None:
        said.append(f"harm at most {router['max_harm']:g}")
    if method.get("any_speed") is False:
        said.append("LoRA for one rate")
    if method.get("draw_power") is not None:
        said.append(f"rates drawn as u^{method['draw_power']:g}")
    if "tune" not in config.get("steps", []):
        said.append("not tuned first")
    return ", ".join(said)


def _static(cells: Cells) -> list[Point]:
    found = [record for record in cells.library.records if record.node["method"] == STATIC]
    return _over_seeds(each for record in found for each in _points(record))


def _routed(cells: Cells) -> list[Record]:
    models = set(cells.scale.models.values())
    found = [r for r in cells.library.records if r.node["method"] == "routes" and r.node["model"] in models]
    return sorted(found, key=lambda record: (record.node["data"], record.seed))


def _points(record: Record) -> Iterator[Point]:
    """Every rate at which a record's variants were evaluated; a static set's rate is the one it has."""
    config = record.node["config"]
    shared = {name: config[name] for name in ("model", "data", "lora_phase", "lora")}
    trained = json.dumps({**shared, "tuned": "tune" in config.get("steps", [])}, sort_keys=True)
    shared["lora_phase"] = {key: value for key, value in config["lora_phase"].items() if key not in _LENGTHS}
    settings = json.dumps([{**config["method"], "target_skip": None}, config["router"]], sort_keys=True)
    for name, variant in record.node["variants"].items():
        if name.startswith("router"):
            phases = ("tune", "lora") if name.endswith("lora") else ("tune",)
            steps = sum((record.node.get("phases", {}).get(phase) or {}).get("steps", 0) for phase in phases)
            skip, asked = variant["skip"], config["method"]["target_skip"]
            rate = skip["skip_rate"] if record.node["method"] == STATIC else asked
            parts = {rate: variant} | {float(key): part for key, part in variant.get("rates", {}).items()}
            for rate, part in parts.items():
                if part.get("examples", {}).get("scores") and "skip_rate_by_token" in part["skip"]:
                    yield Point(
                        data=record.node["data"],
                        title=_title(record),
                        settings=settings,
                        lora=name.endswith("lora"),
                        asked=rate,
                        parts={record.seed: part},
                        trained=trained,
                        comparable=json.dumps({**shared, "steps": steps}, sort_keys=True),
                    )


def _over_seeds(points: Iterable[Point]) -> list[Point]:
    """Points of several seeds as one, where data, method, training, rate and test set are the same."""
    groups: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        [part] = point.parts.values()
        test_set = str(part["examples"].get("test_set"))
        key = point.data, point.lora, round(point.asked, 4), point.title, point.settings, point.trained, test_set
        groups[key].append(point)
    joined = []
    for key in sorted(groups):
        parts: dict[int, dict[str, Any]] = {}
        for point in groups[key]:
            parts |= {seed: part for seed, part in point.parts.items() if seed not in parts}
        joined.append(replace(groups[key][0], parts=dict(sorted(parts.items()))))
    return joined
