"""The steps of a run: tune, choose, train, fit again; and one model evaluated at any rate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from firstlab import evaluate
from firstlab.data.task import Example
from firstlab.generate import main as generate
from firstlab.methods.objective import RouteFit
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.route_router import RouteRouter
from firstlab.run import choosing
from firstlab.run.experiment import Experiment
from firstlab.run.load import load_run
from firstlab.run.report import print_table, row_title, rows_of_record
from firstlab.store import results
from support.tiny_run import composed, overrides, save_tiny_model

ROUTES = [
    "method=routes", "data=mini_mixture", "method.fit_prompts=24", "method.sizes=2", "method.swaps=1",
    "method.highest_skip=0.5", "evaluation.skip_rates=[0.1,0.5]", "router.price=length", "data.max_new_tokens=6",
    "phases=[tune,choose,lora,refit,evaluate]", "evaluation.tpot_prompts=0",
]  # fmt: skip


def run(model: Path, runs: Path, *extra: str) -> tuple[Experiment, dict]:
    experiment = Experiment(*composed(*overrides(model, runs, *extra)))
    return experiment, experiment.run()


@pytest.fixture(scope="module")
def any_speed(tiny_model_dir: Path, tmp_path_factory) -> Path:
    experiment, _ = run(tiny_model_dir, tmp_path_factory.mktemp("runs"), *ROUTES)
    return experiment.directory


def test_a_run_of_all_steps_records_each(any_speed: Path):
    record = results.read(any_speed)
    assert set(record["variants"]) == {"router", "router_lora"}
    assert record["config"]["steps"] == ["tune", "refit"] and record["config"]["router"]["kind"] == "routes"
    for phase in ("router", "refit"):
        found = record["phases"][phase]
        low, high = found["gain_interval"]
        assert low <= found["gain"] <= high and found["worth"] == (high < 0)
        assert found["prompts"] == 24 and -10 < found["harm_r2"] <= 1 and 0 < found["highest_rate"] <= 0.5
    assert record["phases"]["tune"]["steps"] == record["phases"]["lora"]["steps"] == 4
    for variant in record["variants"].values():
        rates = [each["skip"]["skip_rate_by_token"] for each in variant["rates"].values()]
        assert len(rates) == 2 and rates[0] <= rates[1]


@pytest.mark.parametrize(
    ("parts", "given", "power"), [("ab", None, 1.0), ("a", None, 0.5), ("ab", 0.7, 0.7), ("a", 2, 2)]
)
def test_within_one_task_more_high_rates_are_drawn(monkeypatch, parts, given, power):
    examples = [Example(str(i), "text", ("r",), part=parts[i % len(parts)]) for i in range(6)]
    monkeypatch.setattr(choosing, "read_means", lambda prompts: torch.zeros(6, 5 * 4))
    fake = SimpleNamespace(
        data=SimpleNamespace(train=examples, val=examples),
        method=SimpleNamespace(per_prompt=False, route_fit=lambda: RouteFit(target_skip=0.25, draw_power=given)),
        model=SimpleNamespace(routers=RouteRouter(8, 4)),
        routes=lambda examples: None,
        prompts=lambda examples: None,
    )
    drawn, _ = choosing.training_routes(fake)
    assert drawn.power == power


def test_tables_tell_the_tuned_model_with_its_routes_from_a_router_alone(any_speed: Path):
    record = results.read(any_speed)
    titles = [row_title(row) for row in rows_of_record(record)]
    rates = ["target 25 %", "asked 10 %", "asked 50 %"]
    assert titles == [f"routes {name} ({rate})" for name in ("Tuned + router", "Router + LoRA") for rate in rates]
    untuned = {**record, "phases": {**record["phases"], "tune": None}}
    assert row_title(rows_of_record(untuned)[0]) == "routes Router (target 25 %)"


def test_every_product_is_where_a_reader_looks(any_speed: Path, tiny_model_dir: Path):
    before, after = (load_run(any_speed, name).model for name in ("router", "router_lora"))
    assert isinstance(before.routers, RouteRouter) and before.has_lora  # the tuned model's
    assert isinstance(after.routers, RouteRouter) and after.has_lora
    refitted = RouterAugmentedLM.from_pretrained(any_speed / "refit", base=tiny_model_dir)
    assert torch.equal(refitted.routers.harm_weight, after.routers.harm_weight)
    lora = RouterAugmentedLM.from_pretrained(any_speed / "lora", base=tiny_model_dir)
    name, weight = next((n, p) for n, p in lora.lm.named_parameters() if "lora_B" in n)
    assert torch.equal(weight, refitted.lm.get_parameter(name))
    assert not torch.equal(weight, before.lm.get_parameter(name))


def test_a_run_that_lost_its_last_steps_repeats_only_these(any_speed: Path, tiny_model_dir: Path, tmp_path: Path):
    copy = tmp_path / any_speed.parent.name / any_speed.name
    shutil.copytree(any_speed, copy)
    before = results.read(copy)
    for gone in ("refit", "evaluation", "predictions"):
        shutil.rmtree(copy / gone)
    with pytest.raises(ValueError, match="refit is not there"):  # the LoRA alone is another model
        load_run(copy, None)
    (copy / "refit.yaml").unlink()
    (copy / "result.json").unlink()
    trained = (copy / "lora" / "adapter_model.safetensors").stat().st_mtime_ns
    _, after = run(tiny_model_dir, tmp_path, *ROUTES)
    assert (copy / "lora" / "adapter_model.safetensors").stat().st_mtime_ns == trained
    for name, variant in before["variants"].items():
        assert after["variants"][name]["metrics"] == variant["metrics"]
        assert after["variants"][name]["skip"] == variant["skip"]


def test_routers_that_are_recorded_and_lost_are_no_base_model(any_speed: Path, tmp_path: Path):
    shutil.copytree(any_speed, tmp_path / "run", ignore=shutil.ignore_patterns("router", "lora*", "refit*"))
    with pytest.raises(ValueError, match="router is not there"):
        load_run(tmp_path / "run", None)


def trained(directory: Path, model: Path, *extra: str, until: str | None = None) -> int:
    """Train in a process of its own, which is killed once a file of the run is there."""
    command = [sys.executable, "-m", "firstlab.train", *overrides(model, directory, *ROUTES, *extra)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    while until and process.poll() is None and not list(directory.rglob(until)):
        time.sleep(0.01)
    if until:
        process.kill()
    return process.wait()


def assert_same_fit(directory: Path, reference: Path) -> None:
    found = results.read(directory / reference.parent.name / reference.name)
    wanted = results.read(reference)
    for step in ("router", "refit"):
        for key in ("harm_r2", "gain", "skip_rate_by_token", "routes"):
            assert found["phases"][step][key] == pytest.approx(wanted["phases"][step][key], abs=1e-4), (step, key)
    for name, variant in wanted["variants"].items():
        assert found["variants"][name]["skip"]["per_layer"] == pytest.approx(variant["skip"]["per_layer"])
        assert found["variants"][name]["perplexity"] == pytest.approx(variant["perplexity"], rel=1e-4)


def test_a_killed_fit_goes_on_in_two_processes_as_in_one(any_speed: Path, tiny_model_dir: Path, tmp_path: Path):
    assert trained(tmp_path, tiny_model_dir, until="*.0.jsonl") == -signal.SIGKILL
    assert not list(tmp_path.rglob("result.json"))
    assert trained(tmp_path, tiny_model_dir, "trainer=ddp") == 0
    assert_same_fit(tmp_path, any_speed)
    [dense] = [results.read(file) for file in tmp_path.glob("*/none*")]
    assert dense["phases"]["lora"]["steps"] == 8 and not dense["config"]["evaluation"].get("skip_rates")


def test_commands_take_a_rate(any_speed: Path, capsys: pytest.CaptureFixture[str]):
    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            generate([f"run={any_speed}", "part=mini_ende", "max_new_tokens=4", *arguments, "a b c"])
        assert end.value.code == 2
        return capsys.readouterr().err

    generate([f"run={any_speed}", "part=mini_ende", "max_new_tokens=4", "skip_rate=0", "a b c"])
    assert "(0.0 %)" in capsys.readouterr().out
    generate([f"run={any_speed}", "part=mini_ende", "max_new_tokens=4", "lossless=true", "a b c"])
    assert "dense passes" in capsys.readouterr().out
    assert "skip_rate" in said("skip_rate=0.9")
    with pytest.raises(SystemExit):
        evaluate.main([f"run={any_speed}", "evaluation.skip_rates=[0.1,0.9]", "trainer.progress_bar=false"])
    assert "skip_rate=0.9 must lie between 0 and" in capsys.readouterr().err
    assert "fixed" in said("skip_rate=0.2", "variant=base")
    assert "lossless" in said("lossless=true", "decoder=engine")
    evaluate.main(
        [f"run={any_speed}", "evaluation.limit=3", "evaluation.skip_rates=[0.25]", "trainer.progress_bar=false"]
    )
    record = json.loads(capsys.readouterr().out.splitlines()[-1])["record"]
    assert set(json.loads(Path(record).read_text())["variants"]["router_lora"]["rates"]) == {"0.25"}


@pytest.mark.parametrize("method", ["sleb", "first", "static_first"])
@pytest.mark.parametrize("start", ["scratch", "continue"])
def test_other_methods_are_chosen_on_the_tuned_model(method: str, start: str, tiny_model_dir: Path, tmp_path: Path):
    steps = "[tune,router,lora,evaluate]" if method == "sleb" else "[tune,router,lora,refit,evaluate]"
    extra = [f"method={method}", "method.target_skip=0.25", f"phases={steps}", f"lora_start={start}"]
    experiment, record = run(tiny_model_dir, tmp_path, *extra, "evaluation.tpot_prompts=0")
    assert set(record["variants"]) == {"router", "router_lora"}
    assert record["config"].get("lora_start") == (None if start == "scratch" else "continue")
    if method != "sleb":
        assert 0.5 < record["phases"]["refit"]["kept_decisions"] <= 1
    tuned, trained = (
        RouterAugmentedLM.from_pretrained(experiment.directory / each, base=tiny_model_dir) for each in ("tune", "lora")
    )
    name = next(n for n, _ in tuned.lm.named_parameters() if "lora_A" in n)
    moved = (tuned.lm.get_parameter(name) - trained.lm.get_parameter(name)).abs().max()
    assert moved > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["router.kind=routes"], "method=routes"),
        (["method=routes", "router.kind=layers"], "router.kind=routes"),
        (["evaluation.skip_rates=[0.2]"], "knows one rate"),
        (["method=sleb", "phases=[lora,refit]"], "refit"),
        (["phases=[lora,choose,evaluate]"], r"order .*\['router', 'lora', 'evaluate'\]"),
        (["phases=[tune,choose,choose]"], "each once"),
        (["method=sleb", "lora_start=continue", "phases=[choose,lora]"], "add tune"),
        (["method=routes", "method.highest_skip=0.1"], "highest_skip"),
        (["phases=[tune,lora]", "init_from=somewhere"], "tune"),
        (["method=routes", "router.max_harm=-1"], "max_harm"),
        (["method=routes", "evaluation.skip_rates=[2]"], "skip_rates"),
        (["method=routes", "evaluation.skip_rates=[0.2,0.6]"], r"skip_rates=\[0.6\] must lie between 0 and .*=0.45"),
    ],
)
def test_what_does_not_go_together_is_named(options: list[str], message: str, tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *options)))


@pytest.mark.parametrize(
    ("method", "message"), [("routes", "method.highest_skip=0.45 of 2 layers is 1"), ("first", "1 of 2")]
)
def test_a_model_with_too_few_layers_is_refused_before_it_is_tuned(method: str, message: str, tmp_path: Path):
    model = save_tiny_model(tmp_path / "model", num_layers=2)
    steps = "phases=[tune,choose,evaluate]"
    experiment = Experiment(*composed(*overrides(model, tmp_path, f"method={method}", steps)))
    with pytest.raises(ValueError, match=f"{message}.* choose method=none"):
        experiment.run()
    assert not (experiment.directory / "tune").exists()


def test_the_report_shows_scores_and_rates_of_every_part(any_speed: Path, capsys: pytest.CaptureFixture[str]):
    rows = rows_of_record(results.read(any_speed))
    print_table("mixture", rows)
    printed = "".join(capsys.readouterr().out.partition("Skip rate by part")[2].split())
    for row in rows:
        for part, found in row["skip"]["by_part"].items() if row["skip"]["skip_rate"] > 0 else ():
            rates = f"{100 * found['skip_rate']:.1f}%,{100 * found['skip_rate_by_token']:.1f}%"
            assert part in printed and rates in printed


def test_a_run_that_names_no_steps_takes_its_methods(tiny_model_dir: Path, tmp_path: Path):
    def steps(*options: str) -> list[str]:
        given = [each for each in overrides(tiny_model_dir, tmp_path, *options) if not each.startswith("phases=")]
        return composed(*given)[0].phases

    assert steps("method=first") == ["tune", "router", "lora", "refit", "evaluate"]
    assert steps("method=sleb") == ["tune", "router", "lora", "evaluate"]
    for method in ("none", "random_skip"):
        given = [] if method == "none" else ["method.target_skip=0.25"]
        options = [each for each in overrides(tiny_model_dir, tmp_path) if not each.startswith(("phases=", "method."))]
        assert composed(*options, f"method={method}", *given)[0].phases == ["router", "lora", "evaluate"]
    assert steps("method=first", "method.one_phase=true") == ["router", "lora", "evaluate"]


def test_a_tuned_run_is_evaluated_again_without_naming_its_steps(any_speed: Path, tiny_model_dir: Path, tmp_path: Path):
    copy = tmp_path / any_speed.parent.name / any_speed.name
    shutil.copytree(any_speed, copy)
    given = [each for each in ROUTES if not each.startswith("phases=")]
    _, record = run(tiny_model_dir, tmp_path, *given, "phases=[evaluate]")
    assert record["variants"].keys() == {"router", "router_lora"}
    with pytest.raises(ValueError, match="steps"):
        run(tiny_model_dir, tmp_path, *given, "phases=[router,lora,evaluate]")
