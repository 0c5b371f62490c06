"""The dashboard's specification, and what is said where it cannot be saved."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from firstlab.dashboard import main, specification, workspace


def test_a_dry_run_writes_the_specification(tmp_path: Path):
    main([f"dry_run={tmp_path / 'dashboard.json'}", "project=mine"])
    spec = json.loads((tmp_path / "dashboard.json").read_text())
    assert spec["project"] == "mine" and spec["group_by"] == ["group", "job_type"]
    metrics = {metric for section in spec["sections"] for panel in section["panels"] for metric in panel["metrics"]}
    assert {"test/router_lora/bleu", "test/base/skip_rate", "test/router/tpot_ratio", "lora/val/skip_rate"} <= metrics


def test_the_workspace_that_would_be_saved_groups_runs_and_shows_every_metric():
    spec = specification("ours")
    saved = workspace(spec, "me", "mine")._to_model().model_dump()
    assert (saved["entity"], saved["project"], saved["display_name"]) == ("me", "mine", "ours")
    section = saved["spec"]["section"]
    [runs] = section["run_sets"]
    assert runs["grouping"] == [{"section": "run", "name": "group"}, {"section": "run", "name": "job_type"}]
    shown = [
        (bank["name"], panel["view_type"], panel["config"]["chart_title"], panel["config"]["metrics"])
        for bank in section["panel_bank_config"]["sections"]
        for panel in bank["panels"]
    ]
    kinds = {"bar": "Bar Chart", "line": "Run History Line Plot"}
    assert shown == [
        (part["name"], kinds[panel["kind"]], panel["title"], panel["metrics"])
        for part in spec["sections"]
        for panel in part["panels"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "entity=NAME"), (["entity=me"], r"firstlab\[dashboard\]"), (["oops"], "'oops' is not an option")],
)
def test_one_message_says_what_is_missing(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
