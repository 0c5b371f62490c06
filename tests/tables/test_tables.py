"""Tables say what the result files say: the right run in each cell, intervals, tests, and what is missing."""

from __future__ import annotations

import csv
import json
import lzma
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from firstlab.config.compose import conf_dir, search_path
from firstlab.config.grid import Run, ablation_runs, at_rate, planned_runs, run_of, tpot_of
from firstlab.methods.unified_skip import UnifiedSkip
from firstlab.metrics import Scores, evaluate_predictions, from_rows, paired_test
from firstlab.store import results
from firstlab.tables import __main__ as tables_command
from firstlab.tables.__main__ import build, write
from firstlab.tables.analysis import adaptivity, equal_rates, pareto
from firstlab.tables.cells import WORSE, Cells, TablesConfig, load
from firstlab.tables.printed import missing_cell, overhead_table, score_cell, tpot_table
from firstlab.tables.records import Library, read
from firstlab.tables.table import Cell, Column, Table, csv_text, latex, markdown
from support.made_records import record, save
from support.tiny_run import started_with


def settings(*overrides: str) -> TablesConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return load(compose("tables", ["resamples=200", *overrides]))


def cell_run(config: TablesConfig, method: str, level: int, task: str = "squad", changes: tuple[str, ...] = ()) -> Run:
    return run_of(config.scale, task, "llama3_8b", method, level, changes)


@pytest.fixture(scope="module")
def config() -> TablesConfig:
    return settings()


def test_cells_take_the_run_nearest_by_measured_rate_of_the_right_method(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    save(tmp_path, "near", record(first, quality=70, rate=0.16))
    save(tmp_path, "far", {**record(first, quality=60, rate=0.125), "level": "target 12 %"})
    save(tmp_path, "sleb", record(sleb, quality=50, rate=0.15))
    changed = cell_run(config, "first", 15, changes=("lora.rank=2",))
    save(tmp_path, "ablation", record(changed, quality=40, rate=0.15))
    cells = Cells(config, read([str(tmp_path)]))
    score, _ = cells.score(first, False, "f1")
    assert score is not None and abs(score.value - 70) < 8 and score.skip_rate == 0.16
    assert score.low is not None and score.high is not None and score.low < score.value < score.high
    match, _ = cells.find(changed, False)
    assert match is not None and [each.file.stem for each in match.records] == ["ablation"]
    assert cells.find(cell_run(config, "first", 30), False) == (None, "no run near 35.0%; the nearest skipped 16.0%")
    assert cells.find(cell_run(config, "first_soft", 10), False) == (None, "no run")


def test_of_equally_near_runs_the_one_asked_for_the_level_stands_for_it(config: TablesConfig, tmp_path: Path):
    asked, other = cell_run(config, "first", 25), cell_run(config, "first", 15)
    save(tmp_path, "asked", record(asked, rate=0.253))
    save(tmp_path, "drifted", {**record(other, rate=0.251), "level": "target 15 %"})
    for rate, file in ((0.253, "asked"), (0.27, "drifted")):
        save(tmp_path, "asked", record(asked, rate=rate))
        match, _ = Cells(config, read([str(tmp_path)])).find(asked, True)
        assert match is not None and [each.file.stem for each in match.records] == [file]


def test_a_run_that_missed_its_level_is_not_asked_for_again(config: TablesConfig, tmp_path: Path):
    unified = cell_run(config, "unified_skip", 15)
    save(tmp_path, "unified", record(unified, rate=0.2))
    match, reason = Cells(config, read([str(tmp_path)])).find(unified, True)
    assert match is None and reason == "off level: asked for 15.0%, skipped 20.0%"
    assert missing_cell(reason, unified) == Cell("off level", note=reason)


def test_seeds_are_averaged_and_tested_together(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    for seed in (0, 1):
        save(tmp_path, f"first{seed}", record(first, quality=70, seed=seed))
        save(tmp_path, f"sleb{seed}", record(sleb, quality=60, seed=seed))
    cells = Cells(config, read([str(tmp_path)]))
    score, _ = cells.score(sleb, True, "f1", first)
    assert score is not None and score.seeds == 2 and score.deviation is not None
    values = [node["variants"]["router_lora"]["metrics"]["f1"]["value"] for node in map(_node, tmp_path.rglob("sleb*"))]
    assert score.value == pytest.approx(np.mean(values)) and score.deviation == pytest.approx(np.std(values, ddof=1))
    assert score.mark == WORSE and score.p_value is not None and score.p_value < 0.05
    assert score.difference is not None and score.difference < -5
    reference, _ = cells.score(first, True, "f1", first)
    assert reference is not None and reference.mark == "" and reference.p_value is None


@pytest.mark.parametrize(
    ("quality", "rate", "mark"),
    [(60, 0.16, "▼"), (60, 0.18, "(▼)"), (60, 0.12, "▼"), (80, 0.12, "(▲)"), (80, 0.18, "▲"), (70, 0.18, "")],
)
def test_a_mark_that_unequal_skip_rates_may_explain_says_so(
    config: TablesConfig, tmp_path: Path, quality: float, rate: float, mark: str
):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    save(tmp_path, "first", record(first, quality=70, rate=0.15))
    save(tmp_path, "sleb", record(sleb, quality=quality, rate=rate))
    score, _ = Cells(config, read([str(tmp_path)])).score(sleb, False, "f1", first)
    assert score is not None and score.mark == mark
    assert ("skips more" in score_cell(score, "", sleb).note) == mark.startswith("(")


def test_static_sets_meet_the_rate_in_between(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    layer = 1 / record(first)["num_layers"]
    save(tmp_path, "first", record(first, quality=70, rate=0.15))
    cells = Cells(config, read([str(tmp_path)]))
    assert cells.at_rate_of(first, sleb, True, "f1") == (None, (None, None))
    low, high = 0.15 - 0.25 * layer, 0.15 + 0.75 * layer
    save(tmp_path, "less", {**record(sleb, quality=66, rate=low), "level": "less"})
    save(tmp_path, "far", {**record(sleb, quality=90, rate=0.15 + 1.1 * layer), "level": "far"})
    cells = Cells(config, read([str(tmp_path)]))
    found, sets = cells.at_rate_of(first, sleb, True, "f1")
    assert found is None and sets[0] is not None and sets[0].skip_rate == low and sets[1] is None
    save(tmp_path, "more", {**record(sleb, quality=50, rate=high), "level": "more"})
    cells = Cells(config, read([str(tmp_path)]))
    found, sets = cells.at_rate_of(first, sleb, True, "f1")
    assert found is not None and [each.skip_rate for each in sets if each] == [low, high]
    values = {
        name: _node(tmp_path / "results" / f"{name}.json")["variants"]["router_lora"]["metrics"]["f1"]["value"]
        for name in ("first", "less", "more")
    }
    assert found.skip_rate == 0.15 and found.value == pytest.approx(values["first"])
    assert found.other == pytest.approx(0.75 * values["less"] + 0.25 * values["more"])
    assert found.test.difference == pytest.approx(found.value - found.other)
    assert 0 < found.test.p_value < 0.05 and found.test.low > 0
    # A set at the very rate stands alone.
    save(tmp_path, "same", {**record(sleb, quality=60, rate=0.151), "level": "same"})
    found, sets = Cells(config, read([str(tmp_path)])).at_rate_of(first, sleb, True, "f1")
    assert found is not None and sets[0] is sets[1] and sets[0] is not None and sets[0].skip_rate == 0.151


def test_an_equal_rate_is_that_of_the_seeds_that_both_have(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    rates = {0: 0.14, 1: 0.16}
    for seed, rate in rates.items():
        node = record(first, quality=70, rate=rate, seed=seed)
        for part in node["variants"].values():
            part["examples"]["skip_rate"] = results.pack(np.full(part["n"], rate))
        save(tmp_path, f"first{seed}", node)
    for name, quality, rate in (("less", 66, 0.125), ("more", 50, 0.1875)):
        save(tmp_path, name, {**record(sleb, quality=quality, rate=rate, seed=1), "level": name})
    cells = Cells(config, read([str(tmp_path)]))
    values = {
        name: _node(tmp_path / "results" / f"{name}.json")["variants"]["router_lora"]["metrics"]["f1"]["value"]
        for name in ("first1", "less", "more")
    }
    for by_token in (False, True):
        found, _ = cells.at_rate_of(first, sleb, True, "f1", by_token)
        assert found is not None and found.seeds == 1 and found.skip_rate == pytest.approx(0.16)
        assert found.value == pytest.approx(values["first1"])
        assert found.other == pytest.approx(0.44 * values["less"] + 0.56 * values["more"], abs=1e-3)


def test_static_sets_meet_the_rate_over_tokens_too(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    # Half of the prompts do all the skipping; their responses have 5 tokens, the others' 9.
    node = record(first, quality=70, rate=0.15)
    for variant in node["variants"].values():
        count = variant["n"]
        variant["examples"]["skip_rate"] = results.pack([0.3, 0.0] * (count // 2))
        variant["examples"]["response_tokens"] = results.pack([5, 9] * (count // 2))
    save(tmp_path, "first", node)
    for name, quality, rate in (("less", 66, 0.0625), ("more", 50, 0.125)):
        save(tmp_path, name, {**record(sleb, quality=quality, rate=rate), "level": name})
    cells = Cells(config, read([str(tmp_path)]))
    assert cells.at_rate_of(first, sleb, True, "f1")[0] is None  # nothing above 15 %
    found, sets = cells.at_rate_of(first, sleb, True, "f1", by_token=True)
    assert found is not None and [each.skip_rate for each in sets if each] == [0.0625, 0.125]
    assert found.skip_rate == pytest.approx(0.3 * 4 / (4 + 8))
    # Without the references' lengths nothing is made up.
    del node["variants"]["router_lora"]["examples"]["response_tokens"]
    save(tmp_path, "first", node)
    cells = Cells(config, read([str(tmp_path)]))
    assert cells.at_rate_of(first, sleb, True, "f1", by_token=True) == (None, (None, None))


def test_a_test_over_some_of_the_seeds_says_so(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    save(tmp_path, "first", record(first, quality=70))
    for seed, quality in enumerate((60, 90, 90)):
        save(tmp_path, f"sleb{seed}", record(sleb, quality=quality, seed=seed))
    score, _ = Cells(config, read([str(tmp_path)])).score(sleb, False, "f1", first)
    assert score is not None and score.seeds == 3 and score.tested == (0,) and score.p_value is not None
    # Over seed 0 SLEB is worse, and what the cells show is better.
    assert score.difference is not None and score.difference < 0 and score.p_value < 0.05 and score.mark == ""
    assert ", over seed 0" in score_cell(score, "", sleb).note


def test_seeds_that_do_not_differ_have_no_deviation(config: TablesConfig, tmp_path: Path):
    run = cell_run(config, "sleb", 15)
    for seed in (1, 2):
        save(tmp_path, f"seed{seed}", {**record(run), "seed": seed})
    score, _ = Cells(config, read([str(tmp_path)])).score(run, False, "f1")
    assert score is not None and score.deviation is None
    cell = score_cell(score, "", run)
    assert "±" not in cell.text and "2 seeds" in cell.detail


@pytest.mark.parametrize(
    "other", ["data.test_size=20", "data.bucket=8", "init_from=run/router", "+data.task.domain=news"]
)
def test_a_run_on_other_data_or_from_another_start_fills_no_cell(config: TablesConfig, tmp_path: Path, other: str):
    run = cell_run(config, "first", 15)
    node = record(replace(run, overrides=(*run.overrides, *([] if other.startswith("+") else [other]))))
    if other.startswith("+"):
        node["config"]["data"]["task"]["domain"] = "news"
    save(tmp_path, "other", {**node, "note": "a"})
    assert Cells(config, read([str(tmp_path)])).find(run, False) == (None, "no run")


def test_commands_say_rates_exactly(config: TablesConfig):
    rate = at_rate(config.scale, "squad", "llama32_3b", "unified_skip", 3 / 28)
    [given] = [each for each in rate.overrides if each.startswith("method.target_skip=")]
    assert UnifiedSkip(float(given.partition("=")[2])).skipped_layers(28) == 3


def test_an_ablation_is_one_run_where_that_of_another_level_is_nearer(config: TablesConfig, tmp_path: Path):
    wanted, other = (cell_run(config, "first", level, changes=("method.start=dense",)) for level in (15, 25))
    save(tmp_path, "other", record(other, rate=wanted.level))
    cells = Cells(config, read([str(tmp_path)]))
    assert cells.find(wanted, False) == (None, "no run")
    save(tmp_path, "wanted", record(wanted, rate=wanted.level + 0.02))
    match, _ = Cells(config, read([str(tmp_path)])).find(wanted, False)
    assert match is not None and [each.file.stem for each in match.records] == ["wanted"]


def test_an_ablation_without_a_level_takes_whatever_its_settings_skip(config: TablesConfig, tmp_path: Path):
    rows = {(group, name): run for group, name, run in ablation_runs(config.scale, 15)}
    none, some = (rows["β (paper's form, α = 0.01)", beta] for beta in ("0.0", "0.003"))
    assert none.level is None and "method.alpha=0.01" in none.overrides and "target_skip" not in none.command()
    for name, run, rate in (("none", none, 0.62), ("some", some, 0.4)):
        save(tmp_path, name, {**record(run, rate=rate), "level": "α = 0.01"})
    cells = Cells(config, read([str(tmp_path)]))
    for run, rate in ((none, 0.62), (some, 0.4)):
        match, reason = cells.find(run, True)
        assert match is not None and match.skip_rate == rate, reason
    assert cells.find(rows["phases", "one"], True) == (None, "no run")


def test_router_time_comes_from_benchmarks(config: TablesConfig, tmp_path: Path):
    shares = [{"router_share_of_prefill": share} for share in (0.02, 0.03)]
    (tmp_path / "benchmark.json").write_text(json.dumps({"model": "nano", "device": "a CPU", "cells": shares}))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "benchmark.json").write_text("[]")
    library = read([str(tmp_path)])
    assert len(library.warnings) == 1 and "[] is not a mapping" in library.warnings[0]
    rows = {row[0].text: row[-1] for row in overhead_table(Cells(config, library)).rows}
    assert rows["nano"].plain == "2.50 % [2.00, 3.00]" and rows["llama3_8b"].note == "not measured"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [("cells", [{}], "cells has no router_share_of_prefill"), ("cells", None, "it has no cells"),
     ("cells", [None], "cells=None is not a mapping"), ("model", ["nano"], "model=['nano'] is not text"),
     ("device", None, "it has no device"), ("cells", [{"router_share_of_prefill": "x"}], "prefill='x' is not")],
)  # fmt: skip
def test_a_malformed_benchmark_is_left_out_with_the_reason(
    config: TablesConfig, tmp_path: Path, key: str, value: Any, reason: str
):
    node = {"model": "nano", "device": "a CPU", "cells": [{"router_share_of_prefill": 0.02}]} | {key: value}
    (tmp_path / "benchmark.json").write_text(json.dumps(node))
    library = read([str(tmp_path)])
    assert not library.benchmarks and reason in library.warnings[0]
    assert "benchmark.json is left out: " in library.warnings[0]
    overhead_table(Cells(config, library))


def _node(file: Path) -> dict:
    return json.loads(file.read_text())


def test_no_test_across_different_test_sets_or_without_per_prompt_scores(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    other = record(sleb, quality=40)
    other["variants"]["router"]["examples"]["test_set"] = "another"
    del other["variants"]["router_lora"]["examples"]
    save(tmp_path, "a", record(first))
    save(tmp_path, "b", other)
    cells = Cells(config, read([str(tmp_path)]))
    for lora in (False, True):
        score, _ = cells.score(sleb, lora, "f1", first)
        assert score is not None and score.low is not None and score.p_value is None and score.mark == ""


def test_seeds_on_another_test_set_are_left_out_and_named(config: TablesConfig, tmp_path: Path):
    run = cell_run(config, "first", 15)
    for seed, test_set in enumerate(("one", "two", "two", "three")):
        node = record(run, quality=40 + 10 * seed, seed=seed)
        node["variants"]["router"]["examples"]["test_set"] = test_set
        node["variants"]["router_lora"]["examples"]["test_set"] = str(seed)
        save(tmp_path, f"seed{seed}", node)
    cells = Cells(config, read([str(tmp_path)]))
    score, _ = cells.score(run, False, "f1")
    assert score is not None and (score.seeds, score.others) == (2, (0, 3)) and 50 < score.value < 70
    assert "without seeds 0, 3, evaluated on another test set" in score_cell(score, "", run).note
    alone, _ = cells.score(run, True, "f1")
    assert alone is not None and (alone.seeds, alone.others) == (1, (1, 2, 3)) and alone.value < 55


def test_a_seed_counts_once_and_the_first_folder_wins(config: TablesConfig, tmp_path: Path):
    run = cell_run(config, "first", 15)
    save(tmp_path / "recorded", "a", record(run, quality=60))
    save(tmp_path / "recorded", "b", record(run, quality=62, seed=1))
    save(tmp_path / "local", "a", record(run, quality=20))
    match, _ = Cells(config, read([str(tmp_path / "recorded"), str(tmp_path / "local")])).find(run, False)
    assert match is not None and [each.file.parts[-3] for each in match.records] == ["recorded", "recorded"]
    assert [each.seed for each in match.records] == [0, 1]


def test_settings_that_the_methods_file_leaves_out_count(config: TablesConfig, tmp_path: Path):
    run = cell_run(config, "sleb", 15)
    node = record(run)
    wide, engine = (
        replace(run, overrides=(*run.overrides, each))
        for each in ("method.search_width=4", "evaluation.decoder=engine")
    )
    for width, counts in ((1, (1, 0, 0)), (4, (0, 1, 0))):
        node["config"]["method"]["search_width"] = width
        save(tmp_path, "one", node)
        library = read([str(tmp_path)])
        assert tuple(len(library.of(each, config.scale)) for each in (run, wide, engine)) == counts


def test_nothing_that_a_record_names_is_imported(config: TablesConfig, tmp_path: Path):
    mark = tmp_path / "MARK"
    hostile = {"_target_": "os.system", "command": f"touch {mark}"}
    for path in ("method", "data.task", "model.path", "lora.rank", "evaluation.comet"):
        node = damaged(record(cell_run(config, "first", 15)), f"config.{path}", hostile)
        save(tmp_path, path, {**node, "config_hash": path})
    library = read([str(tmp_path)])
    assert len(library.records) == 5
    build(config, library)
    assert not mark.exists()


def test_runs_on_another_number_of_test_prompts_are_others(tmp_path: Path):
    scales = {limit: settings(f"scale.base=['evaluation.limit={limit}']") for limit in (200, 1000)}
    for limit, scale in scales.items():
        save(tmp_path, f"of{limit}", record(cell_run(scale, "sleb", 15), quality=limit / 10))
    cells = {limit: Cells(scale, read([str(tmp_path)])) for limit, scale in scales.items()}
    for limit, scale in scales.items():
        match, _ = cells[limit].find(cell_run(scale, "sleb", 15), True)
        assert match is not None and [each.file.stem for each in match.records] == [f"of{limit}"]


@pytest.mark.parametrize(
    "changed",
    [{"model": {"quantization": "int8"}}, {"model": {"path": "elsewhere"}}, {"model": {"dtype": "bfloat16"}},
     {"model": {"revision": "main"}}, {"data": {"max_new_tokens": 8}}, {"data": {"val_size": 7}},
     {"data": {"task": {"_target_": "another"}}}],
)  # fmt: skip
def test_an_evaluation_with_another_model_or_other_data_is_another_run(
    config: TablesConfig, tmp_path: Path, changed: dict
):
    run = cell_run(config, "sleb", 15)
    own, other = record(run, quality=70), record(run, quality=40)
    for section, keys in changed.items():
        other["config"][section] = other["config"][section] | keys
    for folder, node in (("seed0", own), ("seed0/evaluations/other", other)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "result.json").write_text(json.dumps(node))
    assert [each.file.parent.name for each in read([str(tmp_path)]).of(run, config.scale)] == ["seed0"]
    # Where the files of the data lie does not matter.
    own["config"]["data"] |= {"root": "a folder", "task": own["config"]["data"]["task"] | {"root": "a folder"}}
    (tmp_path / "seed0" / "result.json").write_text(json.dumps(own))
    assert [each.file.parent.name for each in read([str(tmp_path)]).of(run, config.scale)] == ["seed0"]


def test_cells_may_ask_for_another_model_and_other_data(tmp_path: Path):
    config = settings("scale.base=['model.dtype=bfloat16','data.max_new_tokens=8']")
    run = cell_run(config, "sleb", 15)
    node = record(run)
    assert (node["config"]["model"]["dtype"], node["config"]["data"]["max_new_tokens"]) == ("bfloat16", 8)
    save(tmp_path, "a", node)
    library = read([str(tmp_path)])
    assert len(library.of(run, config.scale)) == 1 and not library.of(cell_run(settings(), "sleb", 15), config.scale)


def test_a_runs_own_result_stands_before_later_evaluations_of_it(config: TablesConfig, tmp_path: Path):
    run = cell_run(config, "first", 15)
    for folder, quality in (("seed0/evaluations/again", 40), ("seed0", 70)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "result.json").write_text(json.dumps(record(run, quality=quality)))
    match, _ = Cells(config, read([str(tmp_path)])).find(run, True)
    assert match is not None and [each.file.parent.name for each in match.records] == ["seed0"]


def test_an_evaluation_on_another_task_or_with_another_seed_stands_for_no_cell(config: TablesConfig, tmp_path: Path):
    here, there = cell_run(config, "first", 15, "squad"), cell_run(config, "first", 15, "cnn_dm")
    nodes = {
        "seed0": record(here),
        "seed0/evaluations/again": record(here, quality=71),
        "seed0/evaluations/other": record(there),
        "seed0/evaluations/drawn": record(here, seed=1),
    }
    for folder, node in nodes.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "result.json").write_text(json.dumps(node))
    library = read([str(tmp_path)])
    assert len(library.records) == 4 and not library.warnings
    assert [each.file.parent.name for each in library.of(here, config.scale)] == ["seed0", "again"]
    assert not library.of(there, config.scale)


DAMAGE: list[tuple[str, Any, str]] = [
    ("variants", [], "variants=[] is not a mapping"),
    ("variants", None, "it has no variants"),
    ("variants.router", None, "variants.router=None is not a mapping"),
    ("config", "x", "config='x' is not a mapping"),
    ("config.evaluation", None, "config has no evaluation"),
    ("config.data", [], "config.data=[] is not a mapping"),
    ("seed", "x", "seed='x' is not a whole number"),
    ("seed", True, "seed=True is not a whole number"),
    ("config_hash", {}, "config_hash={} is not text"),
    ("num_layers", None, "it has no num_layers"),
    ("num_layers", 0, "skip.per_layer has 16 numbers, not 0"),
    ("data", 1, "data=1 is not text"),
    ("wall_s", "x", "wall_s='x' is not a number"),
    ("variants.router.n", None, "variants.router has no n"),
    ("variants.router.skip.skip_rate", ..., "variants.router.skip has no skip_rate"),
    ("variants.router.skip.per_layer", [0.5], "per_layer has 1 numbers, not 16"),
    ("variants.router.skip.per_layer", [None] * 16, "skip.per_layer=None is not a number"),
    ("variants.router.skip.unique_routes", "x", "skip.unique_routes='x' is not a number"),
    ("variants.router.skip.by_difficulty", {"hard": {"n": 1, "skip_rate": 0}}, "by_difficulty has a level"),
    ("variants.router.skip.by_difficulty", {"1": {"n": 1}}, "by_difficulty.1 has no skip_rate"),
    ("variants.router.metrics", {}, "has no metric f1"),
    ("variants.router.metrics.f1.value", "x", "f1.value='x' is not a number"),
    ("variants.router.metrics.f1.value", float("nan"), "f1.value=nan is not a number"),
    ("variants.router.primary_metric", "bleu", "has no metric bleu, its primary_metric"),
    ("variants.router.primary_metric", ..., "variants.router has no primary_metric"),
    ("variants.router.timing.tpot_ratio_quartiles", [1.0], "tpot_ratio_quartiles has 1 numbers, not 2"),
    ("variants.router.examples", 3, "variants.router.examples=3 is not a mapping"),
    ("variants.router.examples.skip_rate", "AAAA", "examples.skip_rate: per-example numbers cannot be read"),
    ("variants.router.examples.skip_rate", 3, "examples.skip_rate=3 is not a list"),
    ("variants.router.examples.nll", [[1], [1, 2]], "examples.nll: per-example numbers cannot be read"),
    ("variants.router.examples.nll", ["1"] * 60, "examples.nll: per-example numbers cannot be read"),
    ("variants.router.examples.nll", results.pack([1, 2]), r"nll has numbers of the shape (2,) for 60 prompts"),
    ("variants.router.examples.scores.f1", results.pack([1]), "f1 has numbers of the shape (1,) for 60 prompts"),
]


def damaged(node: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The node with one value replaced; ... takes it out."""
    *parents, key = path.split(".")
    inner = node
    for each in parents:
        inner = inner[each]
    inner[key] = value
    if value is ...:
        del inner[key]
    return node


@pytest.mark.parametrize("packed", [False, True])
def test_a_malformed_record_is_left_out_with_the_reason(config: TablesConfig, tmp_path: Path, packed: bool):
    text = json.dumps(record(cell_run(config, "first", 15)))
    nodes = {f"bad{i:02}": damaged(json.loads(text), path, value) for i, (path, value, _) in enumerate(DAMAGE)}
    nodes["good"] = json.loads(text)
    lines = [json.dumps({"name": name, **node}) for name, node in nodes.items()]
    if packed:
        (tmp_path / results.PACKED).write_bytes(lzma.compress("\n".join(lines).encode()))
    else:
        for name, node in nodes.items():
            save(tmp_path, name, node)
    library = read([str(tmp_path)])
    assert [each.file.stem for each in library.records] == ["good"]
    for i, ((path, _, reason), line) in enumerate(zip(DAMAGE, library.warnings, strict=True)):
        assert f"bad{i:02}" in line and " is left out: " in line and reason in line, (path, line)


def test_a_metric_that_came_out_as_nan_is_not_measured(config: TablesConfig, tmp_path: Path):
    first, sleb = cell_run(config, "first", 15), cell_run(config, "sleb", 15)
    node = record(first)
    for name, key in (("router", "value"), ("router_lora", "low")):
        node["variants"][name]["metrics"]["f1"][key] = None
    node["variants"]["router"] |= {"timing": None, "perplexity": None, "examples": None}
    save(tmp_path, "first", node)
    save(tmp_path, "sleb", record(sleb))
    library = read([str(tmp_path)])
    cells = Cells(config, library)
    assert not library.warnings and cells.score(first, True, "em")[0] is not None
    for lora in (False, True):
        assert cells.score(first, lora, "f1") == (None, "not measured")
        tested, _ = cells.score(sleb, lora, "f1", first)
        assert tested is not None and tested.p_value is None
    build(config, library)


def test_torn_and_foreign_files_are_named_and_left_out(config: TablesConfig, tmp_path: Path):
    good = record(cell_run(config, "first", 15))
    text = save(tmp_path, "good", good).read_text()
    (tmp_path / "results" / "torn.json").write_text(text[: len(text) // 2])
    save(tmp_path, "foreign", {"a": 1})
    save(tmp_path / "runs", "twin", {**good, "directory": "elsewhere"})
    library = read([str(tmp_path)])
    assert [each.file.stem for each in library.records] == ["good"]
    left_out = {re.search(r"(\w+)\.json is left out", line)[1]: line for line in library.warnings}
    assert set(left_out) == {"torn", "foreign", "twin"}
    assert "not valid JSON" in left_out["torn"] and "it has no method" in left_out["foreign"]
    assert "holds the same run" in left_out["twin"]
    with pytest.raises(ValueError, match="no such folder"):
        read([str(tmp_path / "absent")])


@pytest.mark.parametrize(
    ("override", "message"),
    [("tolerance=0", "tolerance=0.0 is not allowed"), ("resamples=5", "at least 100"), ("results=[]", "at least one"),
     ("reference=nothing", "choose one of none"), ("ablation_level=17", "not one of scale.levels"),
     ("scale.levels={15: 1.5}", "not a skip rate"), ("rate_gap=0", "rate_gap=0.0 is not allowed"),
     ("scale.ablation_model=gpt", "choose one of llama3_8b, llama32_3b"),
     ("+scale.tasks.wmt_enfr=mini_ende", "'wmt_enfr' is not the paper's; say what stands for any of wmt_ende"),
     ("+scale.models.gpt=nano", "'gpt' is not the paper's"), ("~scale.methods.none", "no entry for 'none'")],
)  # fmt: skip
def test_settings_out_of_range_are_named(override: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        settings(override)


@pytest.mark.parametrize("scale", ["nano", "llama"])
def test_every_planned_command_composes_to_what_its_cell_asks_for(scale: str):
    config = settings(f"scale={scale}")
    plan = planned_runs(config.scale)
    named = {table for tables in plan.values() for table in tables}
    assert {f"table{n}" for n in ("1", "2", "3a", "4b", "5", "7b", "9", "14b")} <= named
    assert {run.method for run in plan} == set(config.scale.methods)
    dense = [run for run in plan if run.method == "none"]
    assert len(dense) == len({(run.task, run.model) for run in dense}), "one dense run per task and model"
    # One run of each method and each ablation: composing is slow.
    chosen = {run.method: run for run in plan if not run.changes}
    ablations = [run for _, _, run in ablation_runs(config.scale, 15)][-3:]
    from firstlab.config.compose import composed_config

    for run in [*chosen.values(), *ablations]:
        node = composed_config(run.overrides)
        assert node["data"]["name"] == run.task and node["model"]["name"] == run.model
        if "target_skip" in str(run.overrides):
            assert node["method"]["target_skip"] == pytest.approx(run.level)
        assert f"data={run.task}" in run.command(3) and run.command(3).endswith("seed=3")


def test_levels_are_those_that_the_grid_plans_for_each_task():
    config = settings("scale=llama")
    cells, plan = Cells(config, Library()), planned_runs(config.scale)
    commands = {run.command() for run in plan}
    tables = [equal_rates(cells), pareto(cells), adaptivity(cells)]
    assert not {command for table in tables for command in table.commands} - commands
    shown = {(row[0].text, row[1].text) for row in tables[0].rows}
    assert {level for task, level in shown if task == "squad"} == {"10 %", "15 %", "20 %", "24 %", "28 %", "30 %"}
    assert {level for task, level in shown if task == "cnn_dm"} == {"15 %", "20 %", "27 %"}
    of_sleb = {row[1].text for row in tables[2].rows if (row[0].text, row[2].text) == ("squad", "SLEB")}
    assert of_sleb == {"10 %", "20 %", "30 %"}


def test_a_scale_may_stand_for_a_part_of_the_paper(tmp_path: Path):
    config = settings("scale=multi30k", f"results=[{tmp_path}]")
    save(tmp_path, "none", record(run_of(config.scale, "wmt_ende", "llama3_8b", "none", 0), quality=30.0))
    save(tmp_path, "of_another_scale", record(cell_run(settings(), "none", 0)))
    tables = {table.key: table for table in build(config, read(config.results))}
    assert {row[0].text for row in tables["runs"].rows} == {"nano_parallel"}
    printed = {key for key in tables if key.startswith(("table", "figure"))}
    assert printed == {"table1", "table5", "table8", "table10", "table15", "figure3"} and "ablations" not in tables
    assert {row[0].text for row in tables["table10"].rows} == {"0 %", "15 %", "25 %"}  # the paper also has 35 %
    assert len(tables["table5"].rows) == 2 * 2 and len(tables["table8"].rows) == 1
    assert {run.task for run in planned_runs(config.scale)} == {"multi30k"}
    narrow = replace(config, scale=replace(config.scale, levels={25: 0.25}), ablation_level=25)
    assert "figure3" not in {table.key for table in build(narrow, read(narrow.results))}


def test_a_scale_may_name_files_of_a_folder_of_ones_own(tmp_path: Path):
    for group, text in (("data", "defaults: [mini_qa]\nname: mine\nval_size: 7"), ("method", "defaults: [sleb]")):
        (tmp_path / group).mkdir()
        (tmp_path / group / "mine.yaml").write_text(text)
    config = settings('+scale.methods.mine=["method=mine"]')
    config = replace(config, scale=replace(config.scale, tasks={"squad": "mine"}))
    with started_with(*search_path([str(tmp_path)])):
        save(tmp_path, "mine", record(cell_run(config, "mine", 15), rate=0.15))
        tables = {table.key: table for table in build(config, read([str(tmp_path)]))}
    assert [cell.text for cell in tables["table8"].rows[0]][:4] == ["mine", "Question answering", "4000", "7"]
    assert any(row[0].text == "mine + LoRA" and row[1].kind == "ours" for row in tables["overview"].rows)
    assert search_path([str(tmp_path)])[0] in shlex.split(tables["overview"].commands[0])


def test_tables_of_times_leave_gaps_where_tasks_have_fewer_levels(config: TablesConfig):
    """The paper times summaries at 15, 20 and 27 %."""
    levels = {level: rate for level, rate in config.scale.levels.items() if level not in (20, 27)}
    cells = Cells(replace(config, scale=replace(config.scale, levels=levels)), Library())
    table = tpot_table(cells, "5", tpot_of(cells.scale)["5"])
    assert [cell.text for cell in table.rows[1]][2::4] == ["25 %", "25 %", ""]
    assert all(len(row) == len(table.columns) for row in table.rows)


class Page(HTMLParser):
    """Collects what the page would load from elsewhere, its ids, and its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.ids: list[str] = []
        self.tags: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and not (value or "").startswith(("#", "data:")):
                self.outside.append(f"{tag} {name}={value}")
            if name == "id" and value:
                self.ids.append(value)


def test_everything_is_written_and_the_page_stands_alone(tmp_path: Path):
    config = settings(f"results=[{tmp_path}/in]", f"out={tmp_path}/out")
    for method, quality in (("none", 80.0), ("first", 72.0), ("sleb", 60.0)):
        for level in [0] if method == "none" else [10, 20]:
            save(tmp_path / "in", f"{method}{level}", record(cell_run(config, method, level), quality=quality))
    library = read(config.results)
    tables = build(config, library)
    stale = tmp_path / "out" / "svg" / "figure5.svg"
    stale.parent.mkdir(parents=True)
    stale.touch()
    index = write(config, tables, library)
    assert not stale.exists(), "a picture of other results"
    for ending in ("md", "csv", "tex"):
        assert {file.stem for file in (index.parent / ending).iterdir()} == {table.key for table in tables}
    pictures = sorted((index.parent / "svg").iterdir())
    assert "pareto" in {file.stem for file in pictures}
    assert all(ElementTree.parse(file).getroot().tag.endswith("svg") for file in pictures)
    text = index.read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.outside and "@import" not in text and "url(http" not in text
    assert len(page.ids) == len(set(page.ids)), "ids meet"
    assert page.tags["table"] >= 20 and page.tags["svg"] >= 3 and page.tags["script"] == 1

    by_key = {table.key: table for table in tables}
    rows = {(row[0].text, row[1].text, row[2].text): row for row in by_key["table3a"].rows}
    ours = rows["10 %", "SLEB", "+ LoRA"]
    assert [cell.kind for cell in ours[4:]] == ["ours", "", "ours", ""] and ours[4].mark == WORSE
    paper = rows["20 %", "FiRST, paper's form", "–"]
    assert [cell.text for cell in paper[4:]] == ["no run", "13.21", "no run", "27.48"]
    named = "model=nano data=mini_qa method=first_soft method.target_skip=0.25"
    assert paper[4].command.startswith(f"python -m firstlab.train {named} ")
    assert any("Exact match 40.12" in note for note in by_key["table3b"].notes)
    assert not any("Exact match" in note for note in by_key["table3a"].notes)
    again = {file: file.read_bytes() for file in index.parent.rglob("*.*")}
    write(config, build(config, read(config.results)), library)
    assert again == {file: file.read_bytes() for file in index.parent.rglob("*.*")}, "the same results, the same files"


def test_a_folder_that_cannot_be_written_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(tables_command, "read", lambda _: pytest.fail("read"))
    with pytest.raises(ValueError, match=f"out={tmp_path / 'file' / 'x'} cannot be written .* another folder"):
        tables_command.run(settings(f"out={tmp_path}/file/x"))


def test_forms_of_a_table():
    cells = [
        Cell("a|b_50 %"),
        Cell("70.0", 70.04, "[68, 72]", "▼", kind="ours"),
        Cell("no run", note="why", command="do it", kind="missing"),
        Cell("+1.2", 1.2, "[+1.0, +1.4]", "▲"),
    ]
    columns = [Column("Name"), Column("x", "group"), Column("y", "group"), Column("difference", "group")]
    table = Table("key", "Title", columns, [cells])
    assert "| a\\|b_50 % | 70.0 ▼ [68, 72] | no run | +1.2" in markdown(table) and "do it" in markdown(table)
    (line,) = csv.DictReader(csv_text(table).splitlines())
    assert line["group x"] == "70.04" and line["group x: test"] == "▼" and line["group y: command"] == "do it"
    assert line["group difference: detail"] == "[+1.0, +1.4]" and line["group difference: test"] == "▲"
    assert r"a\textbar{}b\_50 \% & 70.0 $\blacktriangledown$ [68, 72] & no run & +1.2" in latex(table)


def test_no_letter_of_a_cell_breaks_a_table():
    table = Table("key", "Title", [Column("Name")], [[Cell('two\nlines <b> | "x" — a … ≤ ≥ × 中')]])
    assert '| two lines <b> \\| "x" — a … ≤ ≥ × 中 |\n' in markdown(table)
    escaped = r"two lines \textless{}b\textgreater{} \textbar{} ''x'' --- a \dots{} $\leq$ $\geq$ $\times$ 中 \\"
    assert escaped in latex(table).splitlines()


def test_scores_survive_packing_and_average_to_a_paired_test():
    references = [(f"the house number {i} is red",) for i in range(20)]
    predictions = [text.replace("red", "blue") if i % 3 else text for i, (text,) in enumerate(references)]
    for name, metric in evaluate_predictions("translation", predictions, references, resamples=100).items():
        again = from_rows(name, results.unpack(results.pack(metric.rows)))
        assert again.value == pytest.approx(metric.value, abs=1e-4), name
        both = Scores.average([again, again])
        assert both.value == pytest.approx(again.value)
        assert paired_test(both, both, resamples=100).p_value == 1
