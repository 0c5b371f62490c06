"""The transcription of the paper holds to the arithmetic that the paper itself allows."""

from __future__ import annotations

import pytest

from firstlab.store import paper

TABLES = paper.quality_tables()

#: Tables that print an extract of others: extract, then where its cells stand in full.
EXTRACTS = {"1": ("10", "12"), "2": ("9", "11"), "3a": ("14a",), "3b": ("14b",), "4a": ("13a",), "4b": ("13b",)}

#: Metrics that bound others on the same answers: BLEU-2 averages BLEU-1 with a smaller precision, a longest common
#: subsequence is made of unigrams, an exact match has F1 = 1.
BOUNDS = (("bleu2", "bleu1"), ("rougeL", "rouge1"), ("em", "f1"))
#: The paper breaks this bound itself; see the errata.
BROKEN_BOUNDS = {("3b", (20, "skip_decode", True), "em"), ("14b", (20, "skip_decode", True), "em")}


def cells():
    for table in TABLES.values():
        for key, row in table.rows.items():
            for column, printed in row.items():
                yield table, key, column, printed


@pytest.mark.parametrize("extract", EXTRACTS)
def test_extracts_equal_the_detailed_tables(extract: str) -> None:
    compared = 0
    for key, row in TABLES[extract].rows.items():
        for column, printed in row.items():
            (full,) = [TABLES[n].rows[key][column] for n in EXTRACTS[extract] if column[0] in TABLES[n].tasks]
            assert printed.value == full.value, (key, column)
            assert not (printed.borrowed and full.borrowed), f"{key} {column}: legible in neither table"
            compared += not (printed.borrowed or full.borrowed)
    assert compared >= 25, "nearly every cell is read twice, independently"


@pytest.mark.parametrize("number", TABLES)
def test_every_level_has_every_method_with_and_without_lora(number: str) -> None:
    table = TABLES[number]
    methods = ("skip_decode", "random_skip", "unified_skip", "first_soft")
    expected = {(0, "none", lora) for lora in (True, False)}
    expected |= {(level, method, lora) for level in table.levels for method in methods for lora in (True, False)}
    assert set(table.rows) == expected
    assert len(table.levels) == (2 if len(number.rstrip("ab")) == 1 and number != "9" else 3)


def test_scores_are_percentages_and_only_three_are_lost() -> None:
    lost = [(table.number, key, column[1]) for table, key, column, printed in cells() if printed.value is None]
    assert lost == [
        ("10", (35, "random_skip", False), "bleu2"),
        ("10", (35, "unified_skip", False), "bleu2"),
        ("13a", (20, "skip_decode", False), "rouge1"),
    ]
    assert all(0 < printed.value <= 100 for *_, printed in cells() if printed.value is not None)


def test_metrics_that_bound_each_other_do() -> None:
    broken = set()
    for table in TABLES.values():
        for key, row in table.rows.items():
            for lower, upper in BOUNDS:
                for task in table.tasks:
                    a, b = row.get((task, lower)), row.get((task, upper))
                    if a and b and a.value is not None and b.value is not None and a.value > b.value:
                        broken.add((table.number, key, lower))
    assert broken == BROKEN_BOUNDS


def test_averages_of_table_15_are_column_means() -> None:
    node = paper.read()["per_layer"]
    for column in node["columns"]:
        shares = paper.per_layer_shares(column, node["layers"])
        assert len(shares) == 32 and all(0 <= share <= 100 for share in shares)
        assert sum(shares) / 32 == pytest.approx(column["average"], abs=0.0051)
    routers = [column["average"] for column in node["columns"] if column["variant"] == "router"]
    assert routers == sorted(routers), "a greater α skips more"


def test_figure_3_says_what_table_15_says() -> None:
    figure, column = paper.read()["figures"]["3"], paper.read()["per_layer"]["columns"][1]
    shares = column["skipped"]
    assert [layer for layer, share in shares.items() if share > 95] == figure["fully"]
    assert [layer for layer, share in shares.items() if 5 < share < 95] == figure["partly"]


def test_router_shares_are_stated_the_wrong_way_round() -> None:
    routers = paper.read()["routers"]
    exact = {
        name: round(100 * node["hidden_size"] * node["layers"] / node["total_parameters"], 4)
        for name, node in routers.items()
    }
    assert exact == {"llama3_8b": 0.0016, "llama32_3b": 0.0027}
    assert exact["llama3_8b"] == routers["llama32_3b"]["stated_share"]
    assert exact["llama32_3b"] == routers["llama3_8b"]["stated_share"]
    assert {routers[n]["hidden_size"] * routers[n]["layers"] for n in routers} == {131072, 86016}


def test_tpot_falls_as_more_is_skipped() -> None:
    for table in paper.read()["tpot"].values():
        for ratios in table["tasks"].values():
            values = [ratios[level] for level in sorted(ratios)]
            assert values == sorted(values, reverse=True) and 0.6 < values[-1] < values[0] < 1


def test_counts_in_the_errata_are_right() -> None:
    shares = [share for column in paper.read()["per_layer"]["columns"] for share in column["skipped"].values()]
    between = sum(0 < share < 100 for share in shares), sum(5 < share < 95 for share in shares)
    (note,) = [erratum["note"] for erratum in paper.read()["errata"] if erratum["where"] == "Table 15"]
    assert f"only {between[0]} lie strictly" in note and f"and {between[1]} between" in note


def test_table_15_counts_the_prompts_that_table_8_gives() -> None:
    shares = [share for column in paper.read()["per_layer"]["columns"] for share in column["skipped"].values()]

    def fits(prompts: int) -> bool:
        return all(round(100 * round(share * prompts / 100) / prompts, 2) == share for share in shares)

    assert paper.read()["splits"]["wmt_ende"]["test"] == 2038
    assert fits(2038) and not any(map(fits, (2036, 2037, 2039)))


def test_claims_that_the_tables_contradict() -> None:
    errata = {erratum["where"]: erratum["note"] for erratum in paper.read()["errata"]}
    summaries, chinese = TABLES["13a"].rows, TABLES["1"].rows
    ours, unified = (summaries[27, method, True]["cnn_dm", "rouge1"].value for method in ("first_soft", "unified_skip"))
    assert ours is not None and unified is not None and ours < unified
    assert str(ours) in errata["Table 13, caption"] and str(unified) in errata["Table 13, caption"]
    for metric in ("bleu1", "bleu2"):
        kept, whole = (chinese[key]["wmt_enzh", metric].value for key in ((15, "first_soft", True), (0, "none", True)))
        assert kept is not None and whole is not None
        assert f"= {100 * kept / whole:.1f} %" in errata["Section 5.2, translation with LLaMA-3-8B at 15 %"]
    tpot = paper.read()["tpot"]
    for number in ("7a", "7b"):
        gains = [round(100 * (1 - ratio)) for ratio in tpot[number]["tasks"]["squad"].values()]
        assert "{}, {} and {} %".format(*gains) in errata["Section 5.2, latency on SQuAD"]
    lightest = [round(100 * (1 - task[15])) for table in tpot.values() for task in table["tasks"].values()]
    assert f"{min(lightest)} to {max(lightest)} %" in errata["Section 6"]
