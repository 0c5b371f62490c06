"""Tables of route routers: one checkpoint at several rates beside static sets of the same training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from firstlab.config.compose import conf_dir
from firstlab.config.grid import run_of
from firstlab.metrics import Scores, from_rows, paired_test
from firstlab.store import results
from firstlab.tables.any_speed import any_speed, by_part, fits
from firstlab.tables.cells import Cells, TablesConfig, load
from firstlab.tables.records import read
from support.made_records import record, save

FIT = {
    "prompts": 100, "routes": 9, "routes_used": 4, "harm_r2": 0.4, "length_r2": 0.8, "skip_rate_by_token": 0.25,
    "dense_loss": 0.1, "static_loss": 0.3, "routed_loss": 0.2, "gain": -0.1, "gain_interval": [-0.2, -0.05],
    "predicted_harm": 0.11, "measured_harm": 0.1, "worth": True, "price": "length",
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> TablesConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return load(compose("tables", ["resamples=200"]))


def sleb(config: TablesConfig, rate: float, quality: float, seed: int = 0) -> dict[str, Any]:
    """A static set's record at a rate."""
    node = record(run_of(config.scale, "squad", "llama3_8b", "sleb", 15), quality=quality, rate=rate, seed=seed)
    node["config"]["method"]["target_skip"] = rate
    node["config"]["steps"] = ["tune"]
    node["phases"] = {"tune": {"steps": 4}, "lora": {"steps": 4}}
    node["config_hash"] = f"sleb{rate}{seed}"
    for variant in node["variants"].values():
        variant["skip"]["skip_rate_by_token"] = rate
    return node


def routed(config: TablesConfig, asked: float, rates: dict[float, float], seed: int = 0) -> dict[str, Any]:
    """A route router's record: rates asked for, and those over tokens that came out."""
    node = sleb(config, rates[asked], 80, seed)
    node |= {"method": "routes", "phases": {**node["phases"], "router": FIT}, "config_hash": f"routes{seed}"}
    node["config"]["method"]["target_skip"] = asked
    for variant in node["variants"].values():
        parts = {str(rate): copy.deepcopy(variant) for rate in rates if rate != asked}
        for rate, part in parts.items():
            part["skip"]["skip_rate_by_token"] = rates[float(rate)]
        variant["rates"] = parts
    return node


def scores(node: dict[str, Any]) -> Scores:
    return from_rows("f1", results.unpack(node["variants"]["router_lora"]["examples"]["scores"]["f1"]))


def test_a_rate_is_compared_with_the_mixture_of_the_sets_next_to_it(config: TablesConfig, tmp_path: Path):
    ours = [routed(config, 0.25, {0.25: 0.22, 0.4: 0.41}, seed) for seed in (0, 1)]
    few, many = (
        [sleb(config, rate, quality, seed) for seed in (0, 1, 2)] for rate, quality in ((0.125, 70), (0.25, 60))
    )
    for place, node in enumerate([*ours, *few, *many]):
        save(tmp_path, str(place), node)
    table = any_speed(Cells(config, read([str(tmp_path)])))
    assert [row[3].text for row in table.rows] == ["25.0 %", "40.0 %"] * 2
    row = table.rows[2]
    assert row[2].text == "+ LoRA" and row[5].value == pytest.approx(22) and row[6].value == 2
    share = (0.22 - 0.125) / 0.125
    theirs = Scores.average([Scores.blend(scores(few[i]), scores(many[i]), share) for i in (0, 1)])
    test = paired_test(Scores.average([scores(each) for each in ours]), theirs, resamples=200)
    assert row[8].value == pytest.approx(theirs.value)
    assert row[9].value == pytest.approx(test.difference) and row[10].value == pytest.approx(test.p_value)
    assert "seed" not in row[9].detail  # both have all seeds that are compared
    assert table.rows[3][8].note and table.rows[3][8].value is None  # no larger set


def test_one_size_without_a_price_is_a_row_of_its_own(config: TablesConfig, tmp_path: Path):
    ours, rule = routed(config, 0.25, {0.25: 0.25}), routed(config, 0.25, {0.25: 0.25})
    rule |= {"config_hash": "one size", "note": "one_size"}
    rule["config"]["router"] |= {"kind": "routes", "price": "size"}
    rule["config"]["method"]["sizes"] = 1
    del rule["variants"]["router_lora"]
    for place, node in enumerate((ours, rule, sleb(config, 0.25, 60))):
        save(tmp_path, str(place), node)
    cells = Cells(config, read([str(tmp_path)]))
    rows = {(row[1].text, row[2].text): row for row in any_speed(cells).rows}
    [[rule_title, _], *_] = sorted(rows)
    assert rule_title.startswith("PuDDing's rule") and set(rows) == {
        (rule_title, "–"), ("routes", "–"), ("routes", "+ LoRA"),
    }  # fmt: skip
    row = rows[rule_title, "–"]
    assert row[7].detail.startswith("[") and row[9].detail.startswith("[") and row[8].value is not None
    assert {row[1].text for row in fits(cells).rows} == {rule_title, "routes"}


def test_each_part_of_a_mixture_is_compared_at_the_rate_of_the_whole(config: TablesConfig, tmp_path: Path):
    def mixed(node: dict[str, Any], rates: tuple[float, float]) -> dict[str, Any]:
        for variant in node["variants"].values():
            packed = variant["examples"]["scores"].pop("f1")
            halves = np.split(results.unpack(packed), 2)
            for part, half, name in zip(("a", "b"), halves, ("f1", "rougeL"), strict=True):
                variant["examples"]["scores"][f"{part}/{name}"] = results.pack(half)
            variant["examples"]["scores"].pop("em")
            variant["metrics"]["mean"], variant["primary_metric"] = variant["metrics"].pop("f1"), "mean"
            variant["skip"]["by_part"] = {
                part: {"n": 30, "skip_rate": rate + 0.01, "skip_rate_by_token": rate}
                for part, rate in zip(("a", "b"), rates, strict=True)
            }
        return node

    ours = mixed(routed(config, 0.25, {0.25: 0.25}), (0.1, 0.4))
    theirs = mixed(sleb(config, 0.25, 60), (0.25, 0.25))
    for place, node in enumerate((ours, theirs)):
        save(tmp_path, str(place), node)
    table = by_part(Cells(config, read([str(tmp_path)])))
    assert [(row[2].text, row[4].text) for row in table.rows] == [
        (lora, part) for lora in ("–", "+ LoRA") for part in ("a", "b")
    ]
    row = table.rows[3]
    assert (row[5].value, row[6].value) == (pytest.approx(41), pytest.approx(40))
    a, b = (
        from_rows("rougeL", results.unpack(node["variants"]["router_lora"]["examples"]["scores"]["b/rougeL"]))
        for node in (ours, theirs)
    )
    test = paired_test(a, b, resamples=200)
    assert row[7].value == pytest.approx(a.value) and row[8].value == pytest.approx(b.value)
    assert row[9].value == pytest.approx(test.difference) and row[10].value == pytest.approx(test.p_value)


@pytest.mark.parametrize("section", ["lora_phase", "data"])
def test_sets_of_another_training_are_no_comparison(config: TablesConfig, tmp_path: Path, section: str):
    other = sleb(config, 0.25, 60)
    other["config"][section]["batch_size" if section == "lora_phase" else "train_size"] = 7
    save(tmp_path, "ours", routed(config, 0.25, {0.25: 0.25}))
    save(tmp_path, "other", other)
    assert all(row[8].value is None for row in any_speed(Cells(config, read([str(tmp_path)]))).rows)


@pytest.mark.parametrize(("steps", "compared"), [(8, 1), (7, 0)])
def test_as_many_steps_in_another_order_are_a_comparison(
    config: TablesConfig, tmp_path: Path, steps: int, compared: int
):
    other = sleb(config, 0.25, 60)
    other["config"] |= {"steps": [], "lora_phase": {**other["config"]["lora_phase"], "max_steps": steps}}
    other["phases"] = {"tune": None, "lora": {"steps": steps}}
    save(tmp_path, "ours", routed(config, 0.25, {0.25: 0.25}))
    save(tmp_path, "other", other)
    rows = any_speed(Cells(config, read([str(tmp_path)]))).rows
    assert sum(row[8].value is not None for row in rows) == compared


def test_fits_are_shown_and_what_is_no_fit_is_not(config: TablesConfig, tmp_path: Path):
    node = routed(config, 0.25, {0.25: 0.25})
    node["phases"] |= {"refit": {**FIT, "worth": False}, "tune": {"steps": 4}}
    other = routed(config, 0.25, {0.25: 0.25}, seed=1)
    other["phases"]["router"] = {**FIT, "gain": "much"}
    for place, each in enumerate((node, other)):
        save(tmp_path, str(place), each)
    rows = fits(Cells(config, read([str(tmp_path)]))).rows
    assert [(row[2].value, row[3].text) for row in rows] == [(0, "choose"), (0, "refit")]
    assert rows[0][15].value == pytest.approx(50)  # 0.1 of the 0.2 above dense
    assert rows[0][14].detail == "[-0.2000, -0.0500]" and not rows[0][14].mark and rows[1][14].mark
    assert rows[0][8].value == 0.4


def test_records_keep_their_rates(config: TablesConfig, tmp_path: Path):
    node = routed(config, 0.25, {0.25: 0.25, 0.4: 0.4})
    results.add(tmp_path, {"one": node})
    lines = (tmp_path / results.SUMMARY).read_text().splitlines()
    assert sum("asked 40 %" in line for line in lines) == 2 and len(lines) == 5
    [(_, found)] = results.read_all(tmp_path, pytest.fail)
    rows = found["variants"]["router"]["rates"]["0.4"]["examples"]["scores"]["f1"]
    assert isinstance(rows, list)
    assert np.allclose(rows, results.unpack(node["variants"]["router"]["examples"]["scores"]["f1"]))


@pytest.mark.parametrize("broken", ["name", "number", "length"])
def test_damaged_rates_are_named(config: TablesConfig, broken: str):
    node = routed(config, 0.25, {0.25: 0.25, 0.4: 0.4})
    rates = node["variants"]["router"]["rates"]
    if broken == "name":
        rates["much"] = rates.pop("0.4")
    elif broken == "number":
        rates["0.4"]["skip"]["skip_rate"] = "a third"
    else:
        rates["0.4"]["skip"]["per_layer"] = [0.5]
    with pytest.raises(ValueError, match=r"variants.router.rates"):
        results.checked(node, results.RECORD)
