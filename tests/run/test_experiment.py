"""Whole runs on a tiny model: from the configuration to result.json, interrupted, resumed, in several processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from firstlab import evaluate, train
from firstlab.config import build
from firstlab.config.compose import conf_dir, register
from firstlab.model.lm import RouterAugmentedLM
from firstlab.run import loggers
from firstlab.run.directory import taken_over
from firstlab.run.experiment import Experiment
from firstlab.run.load import load_run
from firstlab.store import results
from firstlab.tables.records import read as read_records
from firstlab.training.codebook import constant_accuracy
from support.tiny_run import composed, flat, overrides


def test_a_run_leaves_everything_a_reader_needs(finished: Path):
    record = json.loads((finished / "result.json").read_text())
    assert set(record["variants"]) == {"router", "router_lora"}
    for variant in record["variants"].values():
        assert variant["n"] == 7
        assert set(variant["metrics"]) == {"bleu1", "bleu2", "bleu", "chrf"}
        for metric in variant["metrics"].values():
            assert metric["low"] <= metric["value"] <= metric["high"]
        examples = {key: results.unpack(variant["examples"][key]) for key in ("skip_rate", "response_tokens")}
        assert variant["skip"]["skip_rate_by_token"] == pytest.approx(
            results.rate_by_token(*examples.values()), abs=1e-6
        )
        assert 0 <= variant["skip"]["skip_rate"] <= 1 and len(variant["skip"]["per_layer"]) == 4
        assert variant["perplexity"] > 1
        assert variant["timing"]["tpot_ratio"] > 0
    assert record["resumed"] is False and "resumed" not in record["phases"]["router"]
    assert record["config_hash"] and record["packages"]["torch"] and record["peak_memory_bytes"] > 0
    lines = [json.loads(x) for x in (finished / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 14 and {x["variant"] for x in lines} == {"router", "router_lora"}
    steps = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    keys = {key for step in steps for key in step}
    assert {"test/router_lora/bleu"} | {
        f"{phase}/{name}"
        for phase in ("router", "lora")
        for name in ("train/loss", "val/skip_rate", "rho/layer00", "skip/layer03")
    } <= keys
    assert any(key.startswith("router/lr-") for key in keys)
    assert (finished / "config.yaml").is_file()
    assert (finished.parent / "skip_per_layer.png").stat().st_size > 5_000


def test_measured_skip_rates_are_those_of_the_predictions(finished: Path):
    record = json.loads((finished / "result.json").read_text())
    lines = [json.loads(x) for x in (finished / "predictions.jsonl").read_text().splitlines()]
    for name, variant in record["variants"].items():
        skipped = [len(x["skipped"]) / 4 for x in lines if x["variant"] == name]
        assert variant["skip"]["skip_rate"] == pytest.approx(sum(skipped) / len(skipped))


def test_a_finished_run_is_not_repeated(finished: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "load_model", lambda *_: pytest.fail("loaded a model"))
    config, method = composed(*overrides(tiny_model_dir, finished.parents[1], "method.target_skip=0.25"))
    again = Experiment(config, method).run()
    assert again == results.read(finished)


def test_another_configuration_does_not_get_the_directory(finished: Path, tiny_model_dir: Path):
    config, method = composed(*overrides(tiny_model_dir, finished.parents[1], "method.target_skip=0.25", "lora.rank=4"))
    with pytest.raises(ValueError, match=r"belongs to another configuration \(lora\.rank: 8 there, 4 now\)"):
        Experiment(config, method)


def test_a_foreign_directory_is_left_alone(tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "precious.txt").write_text("mine")
    for extra in ([], ["overwrite=true"]):
        config, method = composed(*overrides(tiny_model_dir, tmp_path, f"run_dir={tmp_path}", *extra))
        with pytest.raises(ValueError, match="choose another run_dir"):
            Experiment(config, method)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_asking_for_a_gpu_where_there_is_none(tiny_model_dir: Path, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config, method = composed(*overrides(tiny_model_dir, tmp_path, "trainer=gpu"))
    with pytest.raises(ValueError, match="no CUDA device; use trainer=cpu"):
        Experiment(config, method)


def test_what_is_impossible_shows_before_the_dense_run(tiny_model_dir: Path, tmp_path: Path):
    register()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("train", overrides(tiny_model_dir, tmp_path, "method.target_skip=0.9"))
    with pytest.raises(ValueError, match="cannot skip 4 of 4 layers .* lower method.target_skip, to skip at most 2"):
        train.run(config)
    assert [x.name for x in tmp_path.rglob("config.yaml")] == ["config.yaml"]


def test_an_unavailable_model_says_what_to_do(tmp_path: Path):
    config, method = composed(*overrides(tmp_path / "absent", tmp_path))
    with pytest.raises(ValueError, match="is not available.*model.path"):
        Experiment(config, method).run()


def test_a_generated_task_takes_no_root(tiny_model_dir: Path, tmp_path: Path):
    config, method = composed(*overrides(tiny_model_dir, tmp_path, "data.root=somewhere"))
    with pytest.raises(ValueError, match="data.root='somewhere'.*generated"):
        Experiment(config, method).run()


def test_phases_run_alone_and_join_to_the_same_result(finished: Path, tiny_model_dir: Path, tmp_path: Path):
    for phase in ("router", "lora", "evaluate"):
        arguments = overrides(tiny_model_dir, tmp_path, "method.target_skip=0.25", f"phases=[{phase}]")
        run = Experiment(*composed(*arguments))
        run.run()
    assert_same_numbers(run.directory, finished)


def test_phase_2_from_a_saved_phase_1(finished: Path, tiny_model_dir: Path, tmp_path: Path):
    arguments = overrides(
        tiny_model_dir,
        tmp_path,
        "method.target_skip=0.25",
        "phases=[lora,evaluate]",
        f"init_from={finished / 'router'}",
    )
    record = Experiment(*composed(*arguments)).run()
    assert set(record["variants"]) == {"router", "router_lora"}
    with pytest.raises(ValueError, match="needs trained routers.*init_from"):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path / "b", "phases=[lora]"))).run()


@pytest.mark.parametrize("method", ["first_soft", "sleb", "none"])
def test_other_methods_run(tiny_model_dir: Path, tmp_path: Path, method: str):
    target = ["method.target_skip=0.25"] if method == "sleb" else []
    small = [x for x in overrides(tiny_model_dir, tmp_path) if not (method == "none" and x.startswith("method."))]
    record = Experiment(*composed(f"method={method}", *small, *target)).run()
    assert len(record["variants"]) == 2
    if method == "sleb":
        assert record["fixed_routes"].count(False) == 1
        assert record["variants"]["router_lora"]["skip"]["skip_rate"] == 0.25


def test_evaluate_and_generate_from_the_run_directory(finished: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "firstlab.generate", f"run={finished}", "Ünïcode 🙂 text", "max_new_tokens=4"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("layers 0 ") and " of 4 (" in done.stdout.splitlines()[-1]
    done = subprocess.run(
        [sys.executable, "-m", "firstlab.evaluate", f"run={finished}", "variant=base", "evaluation.limit=3"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(Path(json.loads(done.stdout.splitlines()[-1])["record"]).read_text())
    assert record["variants"]["base"]["skip"]["skip_rate"] == 0
    done = subprocess.run(
        [sys.executable, "-m", "firstlab.evaluate", f"run={finished}", "lora.rank=3"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 2 and "lora.rank was fixed" in done.stderr and "Traceback" not in done.stderr


def test_a_run_names_its_variants(finished: Path):
    assert load_run(finished, None).variant == "router_lora"
    with pytest.raises(ValueError, match="variant='best' is unknown; choose one of base, router, router_lora"):
        load_run(finished, "best")


def test_two_processes_give_the_numbers_of_one(finished: Path, tiny_model_dir: Path, tmp_path: Path):
    arguments = overrides(tiny_model_dir, tmp_path, "method.target_skip=0.25", "trainer=ddp")
    done = subprocess.run(
        [sys.executable, "-m", "firstlab.train", *arguments, "compare_with_base=false"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [directory] = [p.parent for p in tmp_path.rglob("result.json")]
    assert_same_numbers(directory, finished)


def test_a_stopped_command_goes_on_when_it_is_given_again(finished: Path, tiny_model_dir: Path, tmp_path: Path):
    arguments = overrides(tiny_model_dir, tmp_path, "method.target_skip=0.25", "compare_with_base=false")
    command = [sys.executable, "-m", "firstlab.train", *arguments]
    directory = tmp_path / finished.relative_to(finished.parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sign, stop in (
        ("checkpoints/router/last.ckpt", signal.SIGKILL),
        ("checkpoints/lora/last.ckpt", signal.SIGINT),
        ("predictions/router_lora.0.part", signal.SIGKILL),
    ):
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # A suite that a shell runs in the background inherits ignored Ctrl-C.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        while not (directory / sign).exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(stop)
        _, errors = process.communicate()
        assert process.returncode == (130 if stop is signal.SIGINT else -stop), errors
        if stop is signal.SIGINT:
            assert errors.splitlines()[-1] == "interrupted; the same command goes on where it was"
            assert "Traceback" not in errors
        assert not (directory / "result.json").exists()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    assert_same_numbers(directory, finished)
    record = json.loads((directory / "result.json").read_text())
    assert record["resumed"] and record["phases"]["router"]["resumed"]  # whose times are not the whole


def assert_same_numbers(directory: Path, reference: Path) -> None:
    """Both results say the same, up to float noise; timings aside."""
    ours, theirs = (json.loads((d / "result.json").read_text())["variants"] for d in (directory, reference))
    for name in theirs:
        for variant in (ours[name], theirs[name]):
            variant.pop("timing")
            variant.pop("source")  # of weights, in which the order of sums shows
        mine, other = flat(ours[name]), flat(theirs[name])
        assert mine.keys() == other.keys()
        for key, value in other.items():
            if key.startswith(".examples.") and key != ".examples.test_set":
                assert results.unpack(mine[key]) == pytest.approx(results.unpack(value), rel=1e-3, abs=1e-3), key
                continue
            assert mine[key] == (pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value), key


def evaluate_and_note(run: Experiment, lengths: list[int]) -> Callable[..., dict[str, Any]]:
    evaluate = run._evaluate

    def noted(name: str, routes: Any, source: str) -> dict[str, Any]:
        lengths.append(run.data.max_length)
        return evaluate(name, routes, source)

    return noted


def test_one_phase_trains_routers_and_lora_together(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    extra = ("method.one_phase=true", "method.target_skip=0.375", "lora_phase.learning_rate=0.01")
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *extra, "data.max_length_router=120")))
    lengths: list[int] = []
    monkeypatch.setattr(run, "_evaluate", evaluate_and_note(run, lengths))
    record = run.run()
    assert lengths == [run.config.data.max_length_lora] * 2  # as in every other run
    assert record["phases"]["router"]["steps"] == 0 and record["phases"]["lora"]["steps"] == 4
    assert set(record["variants"]) == {"router", "router_lora"}
    start, trained = (
        RouterAugmentedLM.from_pretrained(run.directory / name).routers.weight for name in ("router", "lora")
    )
    assert not torch.equal(start, trained)
    checkpoint = torch.load(run.directory / "checkpoints" / "lora" / "last.ckpt", weights_only=True)
    assert {"routers" in name or "lora_" in name for name in checkpoint["state_dict"]} == {True}
    [rates] = {tuple(group["initial_lr"] for group in each["param_groups"]) for each in checkpoint["optimizer_states"]}
    assert rates == (run.config.router_phase.learning_rate, 0.01)


def test_a_codebook_of_one_is_the_static_start(tiny_model_dir: Path, tmp_path: Path):
    # 0.375 of four layers: the static start skips one layer for half of the prompts.
    common = ("method.target_skip=0.375", "phases=[router]", "router_phase.max_steps=1")
    saved = []
    for start in ("static", "codebook"):
        extra = (*common, f"method.start={start}", "method.codebook_size=1", f"note={start}")
        run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *extra)))
        run.run()
        saved.append((run.model.routers.weight, (run.directory / "start.json").read_text()))
    assert saved[0][1] == saved[1][1]
    torch.testing.assert_close(saved[0][0], saved[1][0], rtol=0, atol=0)


def test_a_codebook_needs_prompts_to_find_and_prompts_to_measure(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"codebook_size=5 exceeds method\.calibration_prompts=4: lower the one"):
        composed("method.start=codebook", "method.codebook_size=5", "method.calibration_prompts=4")
    few = ("method.start=codebook", "method.codebook_size=5", "method.calibration_prompts=8", "data.train_size=3")
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, "method.target_skip=0.25", *few)))
    with pytest.raises(ValueError, match=r"needs at least 4 training prompts behind the first 8, and there are 0"):
        run.run()


def test_how_well_the_routers_know_the_codebook_is_recorded(tiny_model_dir: Path, tmp_path: Path):
    extra = ("method.target_skip=0.25", "method.start=codebook", "method.codebook_size=2", "phases=[router]")
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *extra, "method.fit_prompts=8")))
    phase = run.run()["phases"]["router"]
    per_layer = json.loads((run.directory / "codebook.json").read_text())["held_out_accuracy"]
    assert phase["start_accuracy"] == pytest.approx(sum(per_layer) / 4)
    assert 0 <= phase["start_constant_accuracy"] <= 1


def test_constant_decisions_are_taken_from_the_fitted_prompts():
    wanted = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    assert constant_accuracy(wanted, 2).tolist() == [0.5, 0.5]
    assert constant_accuracy(wanted, 3).tolist() == [1.0, 0.0]


def test_a_run_that_never_began_does_not_block_its_directory(tiny_model_dir: Path, tmp_path: Path):
    squad = ["data=squad", f"run_dir={tmp_path / 'run'}", "data.val_size=2", "evaluation.limit=2"]
    with pytest.raises(ValueError, match="data.root=.*gone does not exist"):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *squad, f"data.root={tmp_path / 'gone'}"))).run()
    with pytest.raises(ValueError, match="data.root=.*there does not exist"):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *squad, f"data.root={tmp_path / 'there'}"))).run()
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="belongs to another configuration"):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *squad, f"data.root={tmp_path / 'gone'}")))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(x.relative_to(directory)): x.read_bytes() for x in directory.rglob("*") if x.is_file()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("data.root=nowhere", "data.root='nowhere'"),
        ("model.path=absent", "is not available"),
        ("phases=[lora]", "needs trained routers"),
        ("init_from=absent", "init_from='absent' does not exist"),
    ],
)
def test_overwriting_deletes_nothing_before_the_new_run_has_started(
    tiny_model_dir: Path, tmp_path: Path, wrong: str, message: str
):
    arguments = overrides(tiny_model_dir, tmp_path, f"run_dir={tmp_path / 'run'}", "logger=csv")
    experiment = Experiment(*composed(*arguments))
    with taken_over(experiment.directory, experiment.config):
        pass
    (experiment.directory / "router").mkdir()
    (experiment.directory / "result.json").write_text("{}")
    before = contents(experiment.directory)
    with pytest.raises(ValueError, match=message):
        Experiment(*composed(*arguments, wrong, "overwrite=true")).run()
    assert contents(experiment.directory) == before
    assert (experiment.directory / "router").is_dir() and not (tmp_path / ".run.old").exists()


def test_a_test_prompt_that_never_fits_stops_the_run_before_training(tiny_model_dir: Path, tmp_path: Path):
    def articles(name: str, question: Callable[[int], str]) -> str:
        paragraphs = [
            {
                "context": f"The house number {i} is red and old.",
                "qas": [
                    {"id": f"{name}{i}", "question": question(i), "answers": [{"text": "red", "answer_start": 22}]}
                ],
            }
            for i in range(20)
        ]
        return json.dumps({"data": [{"paragraphs": paragraphs}]})

    def dev(i: int) -> str:
        return f"Which colour has house {i}, " + "and why " * 400 * (i == 13) + "?"

    (tmp_path / "train-v1.1.json").write_text(articles("train", lambda i: f"Which colour has house {i}?"))
    (tmp_path / "dev-v1.1.json").write_text(articles("dev", dev))
    extra = ["data=squad", f"data.root={tmp_path}", "data.train_size=8", "data.val_size=4", "evaluation.limit=null"]
    extra += [f"data.{key}=512" for key in ("max_prompt_length", "max_length_router", "max_length_lora")]
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path / "runs", *extra)))
    with pytest.raises(ValueError, match="raise data.max_"):
        run.run()
    assert list(contents(run.directory)) == ["config.yaml"]


def test_a_failed_start_leaves_no_logs_that_would_block_the_directory(tiny_model_dir: Path, tmp_path: Path):
    arguments = overrides(tiny_model_dir, tmp_path, f"run_dir={tmp_path / 'run'}", "logger=csv", "data.root=nowhere")
    with pytest.raises(ValueError, match="data.root"):
        Experiment(*composed(*arguments)).run()
    assert list(contents(tmp_path / "run")) == ["config.yaml"]


def test_a_logger_that_refuses_stops_the_run_before_anything_is_read(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(_: object) -> None:
        raise ValueError("logger=csv cannot start")

    monkeypatch.setattr(loggers, "open_logger", refuse)
    monkeypatch.setattr(build, "build_data", lambda _: pytest.fail("read data"))
    with pytest.raises(ValueError, match="logger=csv cannot start"):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, "logger=csv"))).run()


def test_overwriting_starts_from_nothing(tiny_model_dir: Path, tmp_path: Path):
    arguments = overrides(tiny_model_dir, tmp_path, f"run_dir={tmp_path / 'run'}", "phases=[router]")
    Experiment(*composed(*arguments)).run()
    (tmp_path / "run" / "earlier").touch()
    Experiment(*composed(*arguments, "overwrite=true", "seed=1")).run()
    assert not (tmp_path / "run" / "earlier").exists() and not (tmp_path / ".run.old").exists()
    assert (tmp_path / "run" / "router" / "routers.safetensors").is_file()


def test_a_result_from_another_start_is_another_run(finished: Path, tiny_model_dir: Path, tmp_path: Path):
    first = composed(*overrides(tiny_model_dir, tmp_path, f"init_from={finished / 'router'}"))[0]
    second = composed(*overrides(tiny_model_dir, tmp_path, f"init_from={tiny_model_dir}"))[0]
    assert len({first.hash(), second.hash(), composed(*overrides(tiny_model_dir, tmp_path))[0].hash()}) == 3
    assert "init_from" not in composed()[0].identity()


def test_a_config_file_of_another_program_protects_its_directory(tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("site: mine\n")
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no config.yaml of a run"):
        Experiment(*composed(*overrides(tiny_model_dir, tmp_path, f"run_dir={tmp_path}", "overwrite=true")))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_evaluation_sees_that_the_text_changed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("train", "test"):
        for language in ("en", "de"):
            (folder / f"{name}.{language}").write_text("a house\na tree\n", encoding="utf-8")
    given = [f"run={finished}", "data=parallel", f"data.root={folder}", "data.val_size=1", "evaluation.tpot_prompts=0"]
    records = []
    for variant, text in (("router", "a house\na tree\n"), ("base", "a house\na tree\n"), ("base", "a dog\na cat\n")):
        (folder / "test.en").write_text(text, encoding="utf-8")
        evaluate.main([*given, f"variant={variant}", "data.max_prompt_length=150", "data.max_new_tokens=3"])
        records.append(Path(json.loads(capsys.readouterr().out.splitlines()[-1])["record"]))
    assert records[0] == records[1] != records[2]
    assert set(json.loads(records[0].read_text())["variants"]) == {"router", "base"}
    library = read_records([str(records[0].parent)])  # such records count for tables
    assert len(library.records) == 1 and not library.warnings
    records[2].write_text("{")
    with monkeypatch.context() as patched:
        patched.setattr("firstlab.run.context.evaluate_variant", None)  # the torn record is found before
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*given, "variant=base", "data.max_prompt_length=150", "data.max_new_tokens=3"])
    assert re.search(
        r"result.json is no result of firstlab: not valid JSON .*; delete it to evaluate again", capsys.readouterr().err
    )
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([*given, "evaluation.bogus=1"])
    assert "evaluation.bogus=1: Key 'bogus' not in 'EvaluationConfig'; keys there: limit," in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            evaluate.main([*given, "trainer.accelerator=gpu"])
        assert "this machine has no CUDA device" in capsys.readouterr().err


def test_a_line_torn_by_a_kill_spoils_no_later_line(finished: Path, tiny_model_dir: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    part = run / "predictions" / "router.0.part"
    whole = part.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(whole) == 7
    part.write_text("".join(whole[:6])[:-9], encoding="utf-8")
    for file in (run / "result.json", run / "evaluation" / "router.yaml", run / "predictions" / "router.jsonl"):
        file.unlink()
    given = overrides(tiny_model_dir, tmp_path, "method.target_skip=0.25", f"run_dir={run}", "phases=[evaluate]")
    Experiment(*composed(*given)).run()
    lines = [json.loads(line) for line in part.read_text(encoding="utf-8").splitlines()]
    assert {line["index"] for line in lines} == set(range(7))
    assert (run / "predictions" / "router.jsonl").read_text() == (finished / "predictions" / "router.jsonl").read_text()
