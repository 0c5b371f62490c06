"""Every experiment composes; every wrong value is one message that names the option, before a model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from firstlab.config.compose import conf_dir, load_dict
from firstlab.config.schema import ExperimentConfig
from support.tiny_run import composed

PAPER = sorted(p.stem for p in (Path(conf_dir()) / "experiment").glob("*_a*.yaml") if not p.stem.startswith("_"))
GROUPS = {
    group: sorted(p.stem for p in (Path(conf_dir()) / group).glob("*.yaml"))
    for group in ("model", "data", "method", "trainer", "logger")
}


def test_there_is_an_experiment_for_every_task_and_alpha_of_the_paper():
    wanted = {f"{d}_a{a}" for d in ("wmt_ende", "wmt_enzh", "cnn_dm", "squad") for a in ("0.005", "0.01", "0.025")}
    assert wanted <= set(PAPER)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("model", ["llama3_8b", "llama32_3b"])
def test_experiments_compose_to_the_papers_settings(name: str, model: str):
    config, method = composed(f"+experiment={name}", f"model={model}")
    assert config.model.name == model
    assert name == f"{config.data.name}_a{method.alpha:g}"
    assert (method.objective, method.gate, method.pooled_tokens, method.lam) == ("soft", "soft", "sequence", 0.01)
    assert config.router_phase.accumulate == 5 and config.router_phase.patience == 4
    assert (config.lora.rank, config.lora.lora_alpha, config.lora.dropout) == (8, 32, 0.1)
    assert (config.router_phase.loss_on, config.lora_phase.loss_on) == ("all", "response")
    assert config.evaluation.do_sample and (config.evaluation.temperature, config.evaluation.top_k) == (0.8, 10)


def test_whole_numbers_and_floats_are_one_setting():
    hashes = {composed(f"method.hold_routes={value}", "method.alpha=1")[0].hash() for value in ("0", "0.0")}
    assert hashes == {composed("method.hold_routes=0.0", "method.alpha=1.0")[0].hash()}
    assert composed("method.calibration_prompts=64")[0].identity()["method"]["calibration_prompts"] == 64


def test_the_demo_is_the_defaults_with_fewer_steps_and_prompts():
    (demo, method), (default, expected) = composed("+experiment=demo"), composed()
    assert (demo.model, demo.data) == (default.model, default.data)
    assert replace(method, calibration_prompts=expected.calibration_prompts) == expected
    assert demo.note == "demo" and default.note is None  # its runs do not stand in the way of the defaults'
    assert demo.lora_phase.max_steps < default.lora_phase.max_steps
    assert demo.evaluation.limit < default.evaluation.limit


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in GROUPS.items() for n in names])
def test_every_group_member_composes(group: str, name: str):
    given = {"model=hf": ["model.name=x", "model.path=y"]}.get(f"{group}={name}", [])
    config, _ = composed(f"{group}={name}", *given)
    assert isinstance(config, ExperimentConfig)


def test_names_match_their_files():
    for group in ("model", "data"):
        for name in GROUPS[group]:
            if name != "hf":
                assert getattr(composed(f"{group}={name}")[0], group).name == name


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("method.alpha=-1", r"method\.alpha=-1 must be at least 0"),
        ("method.target_skip=0", r"method\.target_skip=0.*between 0 and 1"),
        ("method.target_skip=1.5", r"method\.target_skip=1\.5.*between 0 and 1"),
        ("method.objective=hard", r"method\.objective='hard'.*soft, decode_consistent"),
        ("method.target_skip=null", r"method\.start=static needs method\.target_skip"),
        ("router.threshold=1", r"threshold.*between 0 and 1"),
        ("router_phase.batch_size=0", r"router_phase\.batch_size=0.*at least 1"),
        ("lora_phase.learning_rate=0", r"lora_phase\.learning_rate=0.*greater than 0"),
        ("lora.rank=0", r"lora\.rank=0"),
        ("evaluation.confidence=95", r"evaluation\.confidence=95"),
        ("trainer.devices=2", r"trainer\.devices=2 needs trainer\.strategy=ddp"),
        ("trainer.precision=8", r"trainer\.precision='8'.*32-true"),
        (
            "trainer.cross_entropy=liger",
            r"trainer\.cross_entropy='liger' needs trainer\.accelerator=gpu",
        ),
        ("phases=[train]", r"phases=\['train'\].*tune, router, lora, refit, evaluate"),
        ("ckpt=best", r"ckpt='best'.*last, none"),
        ("model.dtype=fp8", r"model\.dtype='fp8'.*bfloat16"),
        ("seed=-1", r"seed=-1"),
    ],
)
def test_values_out_of_range_are_named(argument: str, message: str):
    with pytest.raises(ValueError, match=message):
        composed(argument)


def test_a_typo_in_a_method_file_is_named():
    with pytest.raises(ValueError, match="method.*bogus"):
        composed("+method.bogus=1")


def test_identity_ignores_where_and_how_a_run_is_started():
    paper = "phases=[router,lora,evaluate]"
    same = composed("runs=elsewhere", "trainer=ddp", "logger=csv", "overwrite=true", "phases=[evaluate]")[0]
    assert same.hash() == composed(paper)[0].hash() != composed()[0].hash()
    assert composed("seed=1")[0].hash() != composed()[0].hash()
    assert composed("trainer.loss_chunk=7", "data.bucket=1")[0].hash() == composed()[0].hash()


def test_a_gpu_reads_larger_batches_where_no_result_depends_on_them():
    cpu, gpu = composed()[0], composed("trainer=gpu")[0]
    assert gpu.hash() == cpu.hash() and gpu.trainer.tf32 and not cpu.trainer.tf32
    assert (cpu.read_batch_size, gpu.read_batch_size) == (32, 256)
    assert cpu.evaluated() == cpu.evaluation and gpu.evaluated().batch_size == 256
    for fixed in ("evaluation.do_sample=true", "evaluation.decoder=engine"):
        assert composed("trainer=gpu", fixed)[0].evaluated().batch_size == 32


def test_sharded_training_refuses_what_its_strategy_cannot():
    with pytest.raises(ValueError, match=r"trainer\.precision='16-mixed' needs another strategy than fsdp"):
        composed("trainer=fsdp", "trainer.precision=16-mixed")


@pytest.mark.parametrize("method", ["sleb", "shortgpt"])
def test_skipping_in_prefill_names_another_run(method: str):
    config, decode_only = composed(f"method={method}")
    assert config.identity()["method"]["skip_prefill"] is False and decode_only.label == f"{method}-skip0.15"
    config, pruned = composed(f"method={method}", "method.skip_prefill=true")
    assert config.identity()["method"]["skip_prefill"] and pruned.label == f"{method}-skip0.15-prefill"


def test_runs_of_another_confidence_do_not_share_a_directory():
    labels = [composed("method=early_exit", *more)[1].label for more in ([], ["method.confidence=gap"])]
    assert labels == ["early_exit-skip0.15", "early_exit-skip0.15-gap"]


@pytest.mark.parametrize("option", ["data.bucket", "trainer.loss_chunk"])
def test_sizes_of_nothing(option):
    with pytest.raises(ValueError, match=f"{option}=0 is not allowed: at least 1"):
        composed(f"{option}=0")


def test_a_method_setting_left_out_is_the_default_one():
    config, _ = composed("method=sleb")
    shorter = load_dict(config.to_dict() | {"method": {"_target_": config.method["_target_"]}})
    assert shorter.hash() == config.hash()
    assert composed("method=sleb", "method.protect_last=2")[0].hash() != config.hash()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.train_size=-1", r"data\.train_size=-1 is not allowed: at least 1"),
        ("data.val_size=-1", r"data\.val_size=-1 is not allowed: at least 0"),
        ("data.split_seed=-1", r"data\.split_seed=-1 is not allowed: at least 0"),
        ("data.max_length_router=1", r"data\.max_length_router=1 is not allowed: at least 2"),
        ("data.max_new_tokens=0", r"data\.max_new_tokens=0 is not allowed"),
        ("model.path=", r"model\.path='' is not allowed: a hub id or a folder"),
        ("model.attn_implementation=fast", r"model\.attn_implementation='fast'.*sdpa, eager"),
        ("lora.lora_alpha=0", r"lora\.lora_alpha=0 must be at least 1"),
        ("lora.target_modules=[]", r"lora\.target_modules=\[\] names nothing"),
        ("lora_phase.learning_rate=inf", r"lora_phase\.learning_rate=inf is not allowed"),
        ("router_phase.weight_decay=-1", r"router_phase\.weight_decay=-1\.0 is not allowed: at least 0"),
        ("router_phase.gradient_clip=0", r"router_phase\.gradient_clip=0\.0 is not allowed: greater than 0, or null"),
        ("evaluation.top_k=-1", r"evaluation\.top_k=-1 is not allowed: at least 0"),
        ("evaluation.temperature=1e-300", r"evaluation\.temperature=1e-300 is not allowed: .*at least 0\.001"),
        ("lora_phase.learning_rate=1e300", r"lora_phase\.learning_rate=1e\+300 is not allowed"),
        ("data.num_workers=1000", r"data\.num_workers=1000 is not allowed: .*at most 128"),
        ("method.search_width=99999", r"method\.search_width=99999 must be at most 64"),
        ("evaluation.temperature=inf", r"evaluation\.temperature=inf is not allowed"),
        ("evaluation.limit=0", r"evaluation\.limit=0 is not allowed"),
        ("evaluation.comet.batch_size=0", r"evaluation\.comet\.batch_size=0 is not allowed"),
        ("evaluation.bertscore.num_layers=0", r"evaluation\.bertscore\.num_layers=0 is not allowed"),
        ("trainer.precision=16-mixed", r"trainer\.precision='16-mixed' needs trainer\.accelerator=gpu"),
        ("seed=4294967296", r"seed=4294967296 is not allowed: .*below 4294967296"),
        ("run_dir=", r"run_dir='' is not allowed"),
        ("method.alpha=abc", r"method\.alpha='abc' is not allowed: it takes a finite number"),
        ("method.alpha=nan", r"method\.alpha=nan is not allowed: it takes a finite number"),
        ("method.beta=abc", r"method\.beta='abc' is not allowed: it takes a finite number or null"),
        ("method.calibration_prompts=1.5", r"method\.calibration_prompts=1\.5 is not allowed: it takes a whole number"),
        ("method.calibration_prompts=0", r"method\.calibration_prompts=0 must be at least 1"),
        ("method.calibrate_rate=7", r"method\.calibrate_rate=7 is not allowed: it takes true or false"),
        ("method._target_=os.getcwd", r"method\._target_='os\.getcwd' is not a class"),
        ("data.task.pair=7", r"data\.task\.pair=7 is not allowed: it takes text"),
        ("data.task._target_=not.there", r"data\.task\._target_='not\.there' cannot be imported"),
        ("+data.task.bogus=1", r"data\.task\.bogus is unknown: .*MiniTranslation takes pair"),
        ("model=hf", r"model\.name is missing: give model\.name=VALUE"),
    ],
)
def test_every_part_checks_its_values_before_anything_is_loaded(argument: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        composed(argument)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("argument", ["model.name=a/b", "data.name=../x", "note=a/b"])
def test_names_that_would_leave_the_folder_of_runs(argument: str):
    with pytest.raises(ValueError, match=r"is not allowed: letters, digits and \. = \+ - _"):
        composed(argument)
