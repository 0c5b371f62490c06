"""Compute one cell: the runs nearest to its skip level, their mean over seeds, interval and paired test."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

from omegaconf import MISSING, DictConfig

from firstlab.config.compose import settings, store_schema
from firstlab.config.grid import Run, ScaleConfig, level_keys, run_of
from firstlab.config.schema import check_options, option
from firstlab.metrics import PairedTest, Scores, bootstrap_interval, from_rows, paired_test
from firstlab.store import results
from firstlab.tables.records import Library, Record

BETTER, WORSE = "▲", "▼"
#: Why a cell is empty whose run exists: running it again would not fill it.
OFF_LEVEL = "off level"
#: Skip rates that are nearer to each other count as equal.
_SAME_RATE = 0.0025
_BY_TOKEN = ("skip_rate", "response_tokens")


@dataclass
class TablesConfig:
    """What `python -m firstlab.tables` takes."""

    scale: ScaleConfig = field(default_factory=ScaleConfig)
    results: list[str] = field(default_factory=list)  # folders that are searched for result files
    out: str = MISSING
    # How far a run's measured skip rate may lie from a level and still stand for it.
    tolerance: float = option(0.04, above=0, below=1)
    # How far the rates of two runs may lie apart; a mark that a larger gap may explain stands in parentheses.
    rate_gap: float = option(0.02, above=0, below=1)
    significance: float = option(0.05, above=0, below=1)  # level of the paired tests
    confidence: float = option(0.95, above=0, below=1)  # coverage of intervals computed here
    resamples: int = option(1000, least=100)  # draws per interval and per test
    reference: str = "first"  # method that the others are tested against, at the same level and with the same LoRA
    ablation_level: int = 15  # the paper's level (percent) of the ablations, whose rows stand in conf/scale

    def __post_init__(self) -> None:
        self.scale.check()
        check_options(self)
        if not self.results:
            raise ValueError("results=[] is not allowed: name at least one folder, e.g. results=[experiments]")
        if self.reference not in self.scale.methods:
            known = ", ".join(self.scale.methods)
            raise ValueError(f"reference={self.reference!r} is not a method of the scale: choose one of {known}")
        if self.ablation_level not in self.scale.levels:
            known = ", ".join(map(str, self.scale.levels))
            raise ValueError(f"ablation_level={self.ablation_level} is not one of scale.levels: {known}")


store_schema("tables_schema", TablesConfig)


def load(config: DictConfig) -> TablesConfig:
    """The settings. Raises ValueError with the option, its value and what is allowed."""
    return settings(config, TablesConfig)


@dataclass(frozen=True, eq=False)
class Match:
    """Runs that stand for a cell: one method, level and variant, every seed of one test set."""

    records: tuple[Record, ...]  # by seed
    variant: str
    others: tuple[int, ...] = ()  # seeds that are left out, because they were evaluated on another test set

    @functools.cached_property
    def skip_rate(self) -> float:
        """Measured, mean over prompts and seeds."""
        return fmean(part["skip"]["skip_rate"] for part in self.parts)

    @functools.cached_property
    def rate_by_token(self) -> float | None:
        """As `skip_rate`, over the tokens of the references; None where a record does not know them."""
        pairs = [[column(each, self.variant, name) for name in _BY_TOKEN] for each in self.records]
        known = all(numbers is not None for pair in pairs for numbers in pair)
        return fmean(results.rate_by_token(*pair) for pair in pairs) if known else None

    def of(self, seeds: Collection[int]) -> Match:
        """With these seeds only."""
        return replace(self, records=tuple(each for each in self.records if each.seed in seeds), others=())

    @property
    def seeds(self) -> set[int]:
        return {record.seed for record in self.records}

    @property
    def parts(self) -> list[dict[str, Any]]:
        return [record.node["variants"][self.variant] for record in self.records]

    def mean(self, key: str, section: str | None = None) -> float | None:
        """Mean over seeds of a number of the variant, or of a section of it; None where a record lacks it."""
        found: list[Any] = [(part.get(section, {}) if section else part).get(key) for part in self.parts]
        return None if None in found else fmean(found)


@dataclass(frozen=True)
class Score:
    """A metric of a match."""

    value: float  # mean over seeds, 0..100
    low: float | None  # bootstrap interval of that mean over test prompts
    high: float | None  # None for several seeds without per-prompt scores
    seeds: int
    deviation: float | None  # over seeds; None for one, or where no seed differs from another
    skip_rate: float  # measured
    difference: float | None = None  # against the reference
    p_value: float | None = None  # None where there is no test
    #: BETTER or WORSE than the reference where the test says so, and the values shown do not say the contrary; in
    #: parentheses where the better one skips less by more than `rate_gap`.
    mark: str = ""
    tested: tuple[int, ...] = ()  # seeds of the test, those that both have, where one has others
    others: tuple[int, ...] = ()  # seeds left out, because they were evaluated on another test set


@dataclass(frozen=True)
class EqualRate:
    """Two methods at one skip rate, means over the seeds that both have."""

    skip_rate: float  # what the reference skips, measured
    value: float  # the reference's score
    other: float  # the other method's
    seeds: int
    test: PairedTest  # the reference minus the other method


def variant_name(method: str, lora: bool) -> str:
    """The variant of a run that a row shows."""
    return ("base" if method == "none" else "router") + ("_lora" if lora else "")


class Cells:
    """Answers what stands in a cell."""

    def __init__(self, config: TablesConfig, library: Library) -> None:
        self.config, self.library = config, library
        self.scale, self.model = config.scale, next(iter(config.scale.models))  # the first model of the scale
        self.records = [each for each in library.records if each.node["model"] in config.scale.models.values()]
        first = {rate: level for level, rate in sorted(config.scale.levels.items(), reverse=True)}
        self.levels = [first[rate] for rate in sorted(first)]  # one of each skip rate, by rate
        self._runs = functools.cache(lambda run: library.of(run, config.scale))
        self._tested = functools.cache(self._test)
        self._draws: Any = {"confidence": config.confidence, "resamples": config.resamples}
        self.used: set[Record] = set()

    def run(self, task: str, method: str, level: int) -> Run:
        """The run of the first model for a cell; the dense model has one level."""
        return run_of(self.scale, task, self.model, method, 0 if method == "none" else level)

    def find(self, run: Run, lora: bool) -> tuple[Match | None, str]:
        """The runs for a cell and "", or None and why there are none."""
        variant = variant_name(run.method, lora)
        matches = self._matches(run, variant)
        asked_for = [match for match in matches if self._asked_for(match.records[0], run)]
        if run.changes:  # an ablation's row is one run, also where that of another level is nearer
            matches = asked_for
        if not matches:
            return None, "no run"
        wanted, nearest = run.level, matches[0]
        if wanted is not None:
            asked = asked_for[0] if asked_for else None
            # Of runs that are equally near, to a point, the one that was asked for the level stands for it.
            off = {match: abs(match.skip_rate - wanted) for match in matches}
            nearest = min(matches, key=lambda match: (round(off[match], 2), match is not asked, off[match]))
            if off[nearest] > self.config.tolerance + 1e-9:
                if asked is not None:
                    return None, f"{OFF_LEVEL}: asked for {wanted:.1%}, skipped {asked.skip_rate:.1%}"
                return None, f"no run near {wanted:.1%}; the nearest skipped {nearest.skip_rate:.1%}"
        self.used.update(nearest.records)
        return nearest, ""

    def score(self, run: Run, lora: bool, metric: str, reference: Run | None = None) -> tuple[Score | None, str]:
        """The metric in a cell, tested against the reference's cell if one is given; or None and why."""
        match, reason = self.find(run, lora)
        if match is None:
            return None, reason
        found = [part["metrics"].get(metric) for part in match.parts]
        if None in found:
            return None, "not measured"
        values = [each["value"] for each in found]
        low, high = (found[0]["low"], found[0]["high"]) if len(found) == 1 else (None, None)
        scores = _comparable(match.records, match.variant, metric) if len(found) > 1 else None
        if scores is not None:
            low, high = bootstrap_interval(Scores.average(scores), **self._draws)
        deviation = stdev(values) if len(set(values)) > 1 else None
        score = Score(fmean(values), low, high, len(values), deviation, match.skip_rate, others=match.others)
        if reference is None or reference == run:
            return score, ""
        against, _ = self.find(reference, lora)
        tested = self._tested(match.records, against.records, match.variant, metric) if against else None
        if against is None or tested is None:
            return score, ""
        mark = self.mark(tested)
        tested_seeds = tuple(sorted(match.seeds & against.seeds)) if match.seeds != against.seeds else ()
        # Over seeds of which the test has a part, the means that are shown may lie the other way round.
        other = [part["metrics"].get(metric) for part in against.parts]
        if tested_seeds and all(other):
            ahead = score.value - fmean(each["value"] for each in other)
            mark = mark if ahead * tested.difference > 0 else ""
        more_skipped = match.skip_rate - against.skip_rate
        if mark and abs(more_skipped) > self.config.rate_gap + 1e-9 and (more_skipped > 0) == (mark == WORSE):
            mark = f"({mark})"
        return replace(score, difference=tested.difference, p_value=tested.p_value, mark=mark, tested=tested_seeds), ""

    def mark(self, test: PairedTest) -> str:
        """Of a test that is certain, whether the first of the two is better."""
        return "" if test.p_value >= self.config.significance else BETTER if test.difference > 0 else WORSE

    def on_same_prompts(self, run: Run, other: Run, lora: bool) -> bool:
        """Whether two cells are filled, by runs that were evaluated on the same prompts."""
        matches = [self.find(each, lora)[0] for each in (run, other)]
        return None not in matches and len({_test_set(m.records[0], m.variant) for m in matches if m}) == 1

    def at_rate_of(
        self, reference: Run, run: Run, lora: bool, metric: str, by_token: bool = False
    ) -> tuple[EqualRate | None, tuple[Match | None, Match | None]]:
        """The method of `run` at exactly the rate that the reference skips, beside the reference.

        A static set meets a rate, over prompts or over the references' tokens, by taking one layer more for a share of
        the prompts. Returns the comparison, None where one of the two sets has no run, and the sets, the smaller first.
        """
        ours, _ = self.find(reference, lora)
        if ours is None:
            return None, (None, None)
        matches = sorted(self._matches(run, variant_name(run.method, lora)), key=lambda match: match.skip_rate)
        shared = ours.seeds
        while True:
            own = ours.of(shared)
            rate = own.rate_by_token if by_token else own.skip_rate
            below, above = (None, None) if rate is None else self._around(rate, matches, own)
            # What is compared is the seeds that all have, and so is the rate; which may need other sets.
            common = shared & below.seeds & above.seeds if below and above else set()
            if rate is None or below is None or above is None or not common:
                return None, (below, above)
            if common == shared:
                break
            shared = common
        less, more = below.of(shared), above.of(shared)
        gap = more.skip_rate - less.skip_rate
        share = min(max((rate - less.skip_rate) / gap, 0.0), 1.0) if gap > 0 else 0.0
        records = [record for each in (own, less, more) for record in each.records]
        scores = _comparable(records, ours.variant, metric)
        if scores is None:
            return None, (below, above)
        count = len(shared)
        mean = Scores.average(scores[:count])
        pairs = zip(scores[count : 2 * count], scores[2 * count :], strict=True)
        theirs = Scores.average([Scores.blend(a, b, share) for a, b in pairs])
        self.used.update(records)
        test = paired_test(mean, theirs, **self._draws)
        return EqualRate(rate, mean.value, theirs.value, count, test), (below, above)

    @staticmethod
    def _around(rate: float, matches: list[Match], own: Match) -> tuple[Match | None, Match | None]:
        """Of sets by ascending skip rate, the two next to a rate, each less than a layer away; one may be both."""
        layer = 1 / own.records[0].node["num_layers"]
        below = next((m for m in reversed(matches) if rate - layer < m.skip_rate <= rate + _SAME_RATE), None)
        above = next((m for m in matches if rate - _SAME_RATE <= m.skip_rate < rate + layer), None)
        return below, above

    def _matches(self, run: Run, variant: str) -> list[Match]:
        groups: dict[str, dict[int, Record]] = defaultdict(dict)
        for record in self._runs(run):
            if variant in record.node["variants"]:
                # A seed counts once, however often it was run (on other processors, say).
                groups[record.level].setdefault(record.seed, record)
        return [_of_one_test_set([of_seed[seed] for seed in sorted(of_seed)], variant) for of_seed in groups.values()]

    def _asked_for(self, record: Record, run: Run) -> bool:
        keys = level_keys(self.config.scale)
        asked = dict(each.split("=", 1) for each in run.overrides if each.partition("=")[0] in keys)
        return all(record.settings.get(key) == float(value) for key, value in asked.items())

    def _test(
        self, ours: tuple[Record, ...], theirs: tuple[Record, ...], variant: str, metric: str
    ) -> PairedTest | None:
        """Over the seeds that both have; None without per-prompt scores of one test set."""
        a, b = ({record.seed: record for record in each} for each in (ours, theirs))
        seeds = sorted(a.keys() & b.keys())
        scores = _comparable([each[seed] for each in (a, b) for seed in seeds], variant, metric)
        if not scores:
            return None
        return paired_test(Scores.average(scores[: len(seeds)]), Scores.average(scores[len(seeds) :]), **self._draws)


def _comparable(records: Sequence[Record], variant: str, metric: str) -> list[Scores] | None:
    scores = [each for record in records if (each := _scores(record, variant, metric)) is not None]
    one_set = len({_test_set(record, variant) for record in records}) <= 1
    return scores if one_set and len(scores) == len(records) else None


def column(record: Record, variant: str, name: str) -> Any:
    """[N] numbers per test prompt (`firstlab.evaluation.variant.evaluate_variant`), or None in older records."""
    numbers = record.examples(variant).get(name)
    return None if numbers is None else results.unpack(numbers)


@functools.cache
def _scores(record: Record, variant: str, metric: str) -> Scores | None:
    packed = record.examples(variant).get("scores", {}).get(metric)
    if packed is None or metric not in record.node["variants"][variant]["metrics"]:
        return None
    return from_rows(metric, results.unpack(packed))


def _of_one_test_set(records: list[Record], variant: str) -> Match:
    """The most records that were evaluated on one test set; of equally many, those with the smallest seed."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[_test_set(record, variant)].append(record)
    largest = max(groups.values(), key=len)  # the first of equally large ones, and records come by seed
    return Match(tuple(largest), variant, tuple(record.seed for record in records if record not in largest))


def _test_set(record: Record, variant: str) -> str:
    return str(record.examples(variant).get("test_set"))
