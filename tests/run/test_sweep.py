"""Sweeps: every file expands to valid runs; finished runs are not repeated; a failure stops nothing but its run."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from firstlab.config.compose import conf_dir, register
from firstlab.config.grid import ablation_runs, planned_runs
from firstlab.config.schema import SweepConfig
from firstlab.run import sweep
from firstlab.run.load import load
from firstlab.run.sweep import PlannedRun, describe, duration, expand, plan, run_sweep, with_cells
from firstlab.store import results
from firstlab.store.files import claimed
from firstlab.tables import cells

FOLDER = Path(conf_dir()) / "sweep"
FILES = sorted(
    file.relative_to(FOLDER).with_suffix("").as_posix()
    for file in FOLDER.rglob("*.yaml")
    if not file.name.startswith("_")
)


@pytest.fixture(scope="module", autouse=True)
def configuration() -> Iterator[None]:
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        yield


def grids_of(name: str) -> dict[str, Any]:
    sweeper = compose("train", [f"+sweep={name}"], return_hydra_config=True).hydra.sweeper
    return with_cells(sweeper.scale, sweeper.cells, sweeper.grids)


def of_run(overrides: list[str]) -> dict[str, str]:
    return dict(each.split("=", 1) for each in overrides)


@pytest.mark.parametrize("name", FILES)
def test_every_grid_of_every_sweep_composes(name: str):
    composed = compose("train", [f"+sweep={name}"], return_hydra_config=True)
    assert composed.hydra.mode.name == "MULTIRUN" and composed.sweep.name == name and composed.sweep.tables
    assert not composed.compare_with_base
    runs = expand(grids_of(name), {"+sweep": [name]})
    assert runs
    for run in {of_run(each)["method"]: each for each in runs}.values():  # one of each method: composing is slow
        config, method = load(compose("train", run))
        assert config.sweep.name == name
        assert (method.target_skip is None) == ("method.target_skip" not in of_run(run))


@pytest.mark.parametrize("name", ["table15", "ablations", "llama/table1"])
def test_no_two_runs_of_a_sweep_share_a_directory(name: str):
    runs = list({frozenset(of_run(run).items()): run for run in expand(grids_of(name), {"+sweep": [name]})}.values())
    planned = plan(runs, lambda each: compose("train", each), None)
    assert len({run.directory for run in planned}) == len(runs)


@pytest.mark.parametrize(
    ("scale", "name", "least"), [("nano", "tables", 100), ("llama", "llama/tables", 100), ("multi30k", "multi30k", 14)]
)
def test_sweeps_run_what_the_tables_show(scale: str, name: str, least: int):
    plan = planned_runs(cells.load(compose("tables", [f"scale={scale}"])).scale)
    wanted = {frozenset((*run.overrides, "seed=0")) for run in plan}
    assert len(wanted) > least and wanted <= set(map(frozenset, expand(grids_of(name), {})))


@pytest.mark.parametrize(("scale", "name"), [("nano", "ablations"), ("llama", "llama/ablations")])
def test_the_ablation_sweep_runs_what_the_table_shows(scale: str, name: str):
    config = cells.load(compose("tables", [f"scale={scale}"]))
    wanted = [dict(each.split("=", 1) for each in run.overrides) for _, _, run in ablation_runs(config.scale, 15)]
    swept = [of_run(run) for run in expand(grids_of(name), {})]
    assert len(wanted) > 20 and all({**each, "seed": "0"} in swept for each in wanted)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({}, "is no run of the scale nano"),
        ({"tables": ["table1"], "tasks": ["nothing"]}, "is no run of the scale nano"),
        (
            {"methods": ["nothing"], "rates": [0.5]},
            "scale.methods has no entry for 'nothing'; it has none, skip_decode",
        ),
        ({"methods": ["none"], "models": ["nothing"]}, "scale.models has no entry for 'nothing'"),
        ({"tasks": 1}, "hydra.sweeper: "),
        ({"nothing": 1}, "'nothing'"),
    ],
)
def test_cells_that_say_nothing_are_refused(cells: dict, message: str):
    scale = compose("train", ["+sweep=table1"], return_hydra_config=True).hydra.sweeper.scale
    with pytest.raises(ValueError, match=message):
        with_cells(scale, {"a": OmegaConf.create(cells)}, {})


def test_the_paper_form_on_llama_is_the_papers_experiment():
    runs = expand(grids_of("llama/table1"), {"+sweep": ["llama/table1"], "data": ["wmt_ende"]})
    [run] = [each for each in runs if "method.alpha=0.01" in each]
    assert load(compose("train", run))[0].hash() == load(compose("train", ["+experiment=wmt_ende_a0.01"]))[0].hash()


def test_nano_grid_starts_with_the_most_telling_cells():
    runs = [of_run(run) for run in expand(grids_of("nano_grid"), {})]
    tasks = {"mini_ende", "mini_enzh", "mini_summarization", "mini_qa"}
    methods = {"random_skip", "unified_skip", "skip_decode", "first", "first_soft", "sleb"}
    cells = {(t, m, s) for t in tasks for m in methods for s in ("0.15", "0.25")} | {(t, "none", None) for t in tasks}
    head = runs[: len(cells)]
    assert {(r["data"], r["method"], r.get("method.target_skip")) for r in head} == cells
    assert {r["seed"] for r in head} == {"0"} and not any("note" in r for r in head)
    sampled = [r for r in runs if r.get("evaluation.do_sample") == "true"]
    assert {(r["seed"], r["evaluation.temperature"], r["evaluation.top_k"]) for r in sampled} == {
        (seed, "0.8", "10") for seed in "012"
    }
    assert {r["method"] for r in runs[-48:]} == {"static_first", "shortgpt", "early_exit", "oracle"}


def test_grids_are_products_in_order_and_the_command_line_narrows_them():
    grids = {
        "dense": {"method": "none", "seed": [0, 1]},
        "others": {"method": ["first", "sleb"], "method.target_skip": [0.15, 0.25], "note": "at{method.target_skip}"},
    }
    assert expand(grids, {})[:2] == [["method=none", "seed=0"], ["method=none", "seed=1"]]
    assert len(expand(grids, {})) == 6
    assert expand(grids, {"method": ["sleb"], "lora.rank": ["2", "4"], "method.target_skip": ["0.25"]}) == [
        ["lora.rank=2", "method=sleb", "method.target_skip=0.25", "note=at0.25"],
        ["lora.rank=4", "method=sleb", "method.target_skip=0.25", "note=at0.25"],
    ]
    with pytest.raises(ValueError, match=r"method=oracle is not in the sweep, which has none, first, sleb"):
        expand(grids, {"method": ["oracle"]})
    assert expand({}, {"seed": ["0", "1"]}) == [["seed=0"], ["seed=1"]]
    assert expand({"a": {"x": True, "y": None}}, {}) == [["x=true", "y=null"]]


def make(overrides: list[str]) -> Any:
    return compose("train", overrides)


def test_runs_that_cannot_work_stop_the_sweep_before_it_starts(tmp_path: Path):
    with pytest.raises(ValueError, match=r"(?s)method=nonsense.*method.target_skip=2.*between 0 and 1"):
        plan([["method=nonsense"], ["method.target_skip=2"], []], make, None)
    many = [["lora.rnk=2", f"seed={seed}"] for seed in range(3)]
    with pytest.raises(ValueError, match=r"(?m)^  seed=0 \(and 2 more\): Could not override 'lora.rnk'\.$"):
        plan(many, make, None)
    with pytest.raises(ValueError, match=r"lora.rank=4: its run directory .*give one of them a note"):
        plan([["lora.rank=2"], ["lora.rank=4"]], make, None)


def finish(run: PlannedRun, seconds: float) -> None:
    """What a finished run leaves, as far as a plan reads it."""
    names = {"data": run.config.data.name, "model": run.config.model.name, "method": run.method.name}
    where = {"label": run.method.label, "directory": str(run.directory), "seed": run.config.seed, "num_layers": 1}
    settings = {"config": run.config.identity(), "config_hash": run.config.hash()}
    skip, metrics = {"skip_rate": 0, "per_layer": [0]}, {"bleu": {"value": 1, "low": 1, "high": 1}}
    variant = {"n": 1, "skip": skip, "metrics": metrics, "primary_metric": "bleu"}
    variants = dict.fromkeys(("base", "base_lora") if run.method.name == "none" else ("router", "router_lora"), variant)
    results.write(run.directory, {**names, **where, **settings, "variants": variants, "wall_s": seconds})
    (run.directory / "config.yaml").write_text(json.dumps(run.config.to_dict()))


def test_a_plan_knows_what_is_finished_and_estimates_the_rest(tmp_path: Path):
    runs = [[f"runs={tmp_path}", *run] for run in ([], ["seed=1"], ["method=sleb"], ["data=mini_qa"])]
    planned = plan(runs, make, None)
    assert [run.state for run in planned] == ["to do"] * 4 and "time unknown" in describe("s", planned)
    finish(planned[0], 120)
    planned = plan(runs, make, None)
    assert [run.state for run in planned] == ["finished", "to do", "to do", "to do"]
    assert [run.seconds for run in planned] == [120, 120, 120, None]
    text = describe("s", planned)
    assert "4 runs (1 finished, 3 to do); 3 to run, about 4 min one after another for 2 of them, unknown for 1" in text
    # The same result, recorded elsewhere, counts as well.
    recorded = tmp_path / "recorded" / "demo" / "results"
    recorded.mkdir(parents=True)
    (planned[0].directory / "result.json").rename(recorded / "a.json")
    assert plan(runs, make, tmp_path / "recorded")[0].state == "finished"
    record = json.loads((recorded / "a.json").read_text())
    (recorded / "a.json").write_text(json.dumps(record | {"resumed": True}))  # that time is of the last session
    assert [run.seconds for run in plan(runs, make, tmp_path / "recorded")][1:] == [None] * 3
    del record["wall_s"]  # as the evaluation of another run
    (recorded / "a.json").write_text(json.dumps(record))
    assert [run.seconds for run in plan(runs, make, tmp_path / "recorded")] == [None] * 4
    assert plan(runs, make, None)[0].state == "interrupted"
    assert (duration(59), duration(600), duration(7260)) == ("59 s", "10 min", "2 h 01 min")


def test_runs_that_only_train_are_finished_without_a_record(tmp_path: Path):
    runs = [[f"runs={tmp_path}", "phases=[router,lora]", *run] for run in ([], ["method=sleb"], ["seed=1"])]
    planned = plan(runs, make, None)
    for run, products in zip(planned, (["router", "lora"], ["lora"], ["router"]), strict=True):
        for name in products:
            (run.directory / name).mkdir(parents=True)
        (run.directory / "config.yaml").write_text(json.dumps(run.config.to_dict()))
    assert [run.state for run in plan(runs, make, None)] == ["finished", "finished", "interrupted"]
    wanted = [[run[0], "phases=[router,lora,evaluate]", *run[2:]] for run in runs]  # with the evaluation, too
    assert {run.state for run in plan(wanted, make, None)} == {"interrupted"}


def test_directories_of_other_runs_are_all_named(tmp_path: Path):
    runs = [[f"runs={tmp_path}", f"seed={seed}"] for seed in range(3)]
    for run in plan(runs, make, None)[:2]:
        (run.directory / "router").mkdir(parents=True)
        other = run.config.to_dict() | {"lora": {**run.config.to_dict()["lora"], "rank": 3}}
        (run.directory / "config.yaml").write_text(json.dumps(other))
    with pytest.raises(ValueError, match=r"(?s)seed0 .*in a sweep overwrite=true starts every run again.*seed1 "):
        plan(runs, make, None)


def test_torn_and_foreign_records_are_named_and_stop_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture):
    runs = [[f"runs={tmp_path}/runs", *run] for run in ([], ["seed=1"])]
    finish(plan(runs, make, None)[0], 120)
    good = json.loads(next(tmp_path.rglob("result.json")).read_text())
    foreign = ["{", "[]", "{}", json.dumps({**good, "config": {"method": None}}), json.dumps({**good, "data": ["x"]})]
    target = {"_target_": "os.system", "command": f"touch {tmp_path / 'MARK'}"}
    method = {**good, "config": {**good["config"], "method": target}, "config_hash": "x"}
    (tmp_path / "kept" / "results").mkdir(parents=True)
    (tmp_path / "kept" / "results" / "hostile.json").write_text(json.dumps(method))
    for i, text in enumerate(foreign):
        for file in (f"runs/another/{i}/result.json", f"kept/one/results/{i}.json"):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
    capsys.readouterr()
    planned = plan(runs, make, tmp_path / "kept")
    assert [(run.state, run.seconds) for run in planned] == [("finished", 120), ("to do", 120)]
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 2 * len(foreign) and all(".json is left out: " in note for note in notes)
    assert not (tmp_path / "MARK").exists()


def test_a_failure_that_cannot_be_read_is_a_failure(tmp_path: Path):
    [run] = plan([[f"runs={tmp_path}"]], make, None)
    run.directory.mkdir(parents=True)
    (run.directory / "failure.json").write_text("{")
    [run] = plan([[f"runs={tmp_path}"]], make, None)
    assert run.state == "failed earlier" and "failure.json cannot be read" in (run.error or "")


def test_only_what_is_left_is_launched_and_failures_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture):
    runs = [[f"runs={tmp_path}", *run] for run in ([], ["seed=1"], ["seed=2"], ["seed=3"])]
    finish(plan(runs, make, None)[0], 60)
    launched: list[list[str]] = []

    def launch(jobs: list[list[str]]) -> None:
        launched.extend(jobs)
        by_overrides = {tuple(run.overrides): run for run in plan(runs, make, None)}
        for job in jobs:
            run = by_overrides[tuple(job)]
            if "seed=2" in job:
                results.write_failure(run.directory, ValueError("out of luck"))
            elif "seed=3" not in job:
                finish(run, 60)
        raise RuntimeError("a job was killed")

    settings = SweepConfig(name="tried", recorded=None)
    with pytest.raises(SystemExit) as stopped:
        run_sweep(runs, compose=make, launch=launch, settings=settings)
    output = capsys.readouterr().out
    assert stopped.value.code == 1 and launched == runs[1:]
    assert "2 of 4 runs finished" in output and "first-skip0.15-seed2: out of luck" in output
    assert "seed3: ended without a result" in output and "RuntimeError: a job was killed" in output
    planned = plan(runs, make, None)
    assert [run.state for run in planned] == ["finished", "finished", "failed earlier", "to do"]
    results.write_failure(planned[0].directory, ValueError("could not be overwritten"))
    assert plan(runs[:1], make, None)[0].state == "failed earlier"  # for all its earlier result
    (planned[0].directory / results.FAILURE).unlink()
    launched.clear()
    run_sweep(runs, compose=make, launch=launch, settings=SweepConfig(recorded=None, plan_only=True))
    assert launched == []
    gpu = [[*runs[3], "trainer=gpu", "note=gpu"]]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            run_sweep(gpu, compose=make, launch=launch, settings=settings)
        assert launched == []
    run_sweep(
        gpu, compose=make, launch=lambda jobs: finish(plan(jobs, make, None)[0], 60), settings=settings, here=False
    )


def test_finished_runs_are_collected_for_the_record(tmp_path: Path):
    runs = [[f"runs={tmp_path}", f"seed={seed}"] for seed in (0, 1)]
    for run in plan(runs, make, None):
        finish(run, 60)
    settings = SweepConfig(recorded=None, collect=str(tmp_path / "kept"))
    run_sweep(runs, compose=make, launch=lambda jobs: None, settings=settings)
    kept = [file.name for file, _ in results.read_all(tmp_path / "kept", pytest.fail)]
    assert kept == [f"mini_ende-nano--first-skip0.15-seed{seed}" for seed in (0, 1)]
    assert {run.state for run in plan([run[1:] for run in runs], make, tmp_path)} == {"finished"}
    other = [[*runs[0], "router_phase.learning_rate=1", "overwrite=true"]]
    finish(plan(other, make, None)[0], 60)
    with pytest.raises(ValueError, match=r"sweep.collect=.*: .*seed0 records another configuration"):
        run_sweep([other[0][:-1]], compose=make, launch=lambda jobs: None, settings=settings)


def test_recorded_runs_of_this_repository_count_as_finished():
    recorded = Path(conf_dir()).parent / "experiments" / "nano_grid"
    if not recorded.is_dir():
        pytest.skip("not a checkout")
    for _, record in results.read_all(recorded, pytest.fail):
        text = json.dumps(record["config"], sort_keys=True)
        assert hashlib.sha256(text.encode()).hexdigest()[:12] == record["config_hash"]
    paper = ["compare_with_base=false", "phases=[router,lora,evaluate]"]
    runs = [[*paper, *run] for run in ([], ["method=none"], ["method=sleb", "data=mini_qa"])]
    assert [run.state for run in plan(runs, make, recorded)] == ["finished"] * 3


def test_a_directory_has_one_owner(tmp_path: Path):
    target = tmp_path / "runs" / "one"
    hold = f"""
import pathlib, sys
from firstlab.store.files import claimed
with claimed(pathlib.Path({str(target)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"one is in use by process {other.pid} on "), claimed(target, wait=False):
        pass
    other.kill()
    other.communicate()
    with claimed(target, wait=False):
        assert not target.exists()


def test_all_methods_share_one_dense_run():
    from firstlab.run.load import dense_counterpart

    by_hand = load(make(["method=none"]))[0]
    assert by_hand.hash() == load(make(["method=none", "router.input_norm=none", "router_phase.epochs=3"]))[0].hash()
    paper = "phases=[router,lora,evaluate]"
    assert by_hand.hash() == dense_counterpart(load(make([paper]))[0])[0].hash()
    # A run that also tunes trains for twice as long, and so does its dense run.
    twice = dense_counterpart(load(make([]))[0])[0]
    steps = 2 * by_hand.lora_phase.max_steps
    epochs = 2 * by_hand.lora_phase.epochs
    longer = ["method=none", f"lora_phase.max_steps={steps}", f"lora_phase.epochs={epochs}"]
    assert twice.hash() == load(make(longer))[0].hash()
    assert by_hand.hash() != load(make(["method=none", "lora.rank=2"]))[0].hash()


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_from_the_command_line(tmp_path: Path, tiny_model_dir: Path, launcher: str):
    from support.tiny_run import overrides

    small = [x for x in overrides(tiny_model_dir, tmp_path) if not x.startswith(("method.", "trainer."))]
    command = [sys.executable, "-m", "firstlab.train", "+sweep=table15", "method.alpha=0.005,0.01", *small]
    command += [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    if launcher == "basic":
        broken = [*command, "lora.target_modules=[nonsense]", "note=broken"]
        done = subprocess.run(broken, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stderr
        assert "0 of 2 runs finished" in done.stdout and done.stdout.count("failed: ") == 2
        [first, _] = sorted(tmp_path.rglob("failure.json"))
        assert "nonsense" in json.loads(first.read_text())["error"] and "Traceback" in first.read_text()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs (2 to do)" in done.stdout and "2 of 2 runs finished" in done.stdout
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    assert len(before) == 2
    if launcher == "basic":
        again = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "2 runs (2 finished); 0 to run" in again.stdout
        assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}


SBATCH = """
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
last = int(re.search(r"^#SBATCH --array=0-(\\d+)", script, re.M)[1])
print("Submitted batch job 7", flush=True)
if os.fork():
    os._exit(0)
os.dup2(os.open(os.devnull, os.O_RDWR), 1)
os.dup2(1, 2)
slurm = dict(SLURM_JOB_ID="7", SLURM_ARRAY_JOB_ID="7", SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1")
for place in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
    slurm[place] = "0"
for index in range(last + 1):
    state = os.path.join(os.environ["STATES"], f"7_{index}")
    open(state, "w").write("RUNNING" if index else "OUT_OF_MEMORY")
    if index:
        subprocess.run(["bash", sys.argv[-1]], env={**os.environ, **slurm, "SLURM_ARRAY_TASK_ID": str(index)})
        open(state, "w").write("COMPLETED")
"""
SRUN = """
import os, sys
os.execvp(sys.argv[6], sys.argv[6:])  # after --unbuffered --output FILE --error FILE
"""
SACCT = """
import os
print("JobID|State|NodeList")
for job in os.listdir(os.environ["STATES"]):
    print(job, open(os.path.join(os.environ["STATES"], job)).read(), "here", sep="|")
"""


def test_a_job_that_slurm_loses_does_not_end_the_report_of_the_others(tmp_path: Path, tiny_model_dir: Path):
    from support.tiny_run import overrides

    commands, states = tmp_path / "bin", tmp_path / "states"
    commands.mkdir()
    states.mkdir()
    for name, code in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT}.items():
        (commands / name).write_text(f"#!{sys.executable}\n{code}")
        (commands / name).chmod(0o755)
    small = [x for x in overrides(tiny_model_dir, tmp_path / "runs") if not x.startswith(("method", "trainer."))]
    command = [sys.executable, "-m", "firstlab.train", "+sweep=table15", "method.alpha=0.005,0.01", *small]
    command += ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "method.calibration_prompts=4"]
    environment = {**os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "STATES": str(states)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SLURM lost a job; waiting for the others of 2" in done.stderr
    assert "1 of 2 runs finished" in done.stdout and "OUT_OF_MEMORY" in done.stdout
    assert len(list(tmp_path.rglob("result.json"))) == 1


def test_the_plugin_imports_nothing_heavy():
    code = "import hydra_plugins.firstlab_sweeper, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert sweep.__doc__
