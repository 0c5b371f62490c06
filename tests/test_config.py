"""Every experiment composes; every wrong value is one message that names the option, before a model is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from hydra.errors import ConfigCompositionException

from firstlab.config import ExperimentConfig, composed_config, conf_dir, load_dict, own_conf_dirs, read, search_path
from firstlab.entry import check_command_line
from firstlab.methods.base import Method, Prompts
from firstlab.run_directory import check_same
from tiny_run import composed, started_with

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
        ("method.alpha=-1", r"method\.alpha=-1.*negative"),
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
        ("phases=[train]", r"phases=\['train'\].*router, lora, evaluate"),
        ("ckpt=best", r"ckpt='best'.*last, none"),
        ("model.dtype=fp8", r"model\.dtype='fp8'.*bfloat16"),
        ("seed=-1", r"seed=-1"),
    ],
)
def test_values_out_of_range_are_named(argument: str, message: str):
    with pytest.raises(ValueError, match=message):
        composed(argument)


def test_unknown_keys_and_wrong_types_stop_at_composition():
    with pytest.raises(ConfigCompositionException, match="alhpa"):
        composed("method.alhpa=1")
    with pytest.raises(ConfigCompositionException, match="batch_size"):
        composed("router_phase.batch_size=many")


def test_a_typo_in_a_method_file_is_named():
    with pytest.raises(ValueError, match="method.*bogus"):
        composed("+method.bogus=1")


def test_a_configuration_survives_its_file(tmp_path: Path):
    config, _ = composed("method.target_skip=0.25", "lora.target_modules=[q_proj]")
    assert load_dict(config.to_dict()) == config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    again, method = read(tmp_path / "config.yaml", {"data": "mini_qa", "evaluation.limit": "5"})
    assert (again.data.name, again.evaluation.limit, method.target_skip) == ("mini_qa", 5, 0.25)
    with pytest.raises(ValueError, match="data='nonsense'.*mini_qa"):
        read(tmp_path / "config.yaml", {"data": "nonsense"})
    with pytest.raises(ValueError, match="not a run directory"):
        read(tmp_path / "nothing" / "config.yaml")


def test_identity_ignores_where_and_how_a_run_is_started():
    same = composed("runs=elsewhere", "trainer=ddp", "logger=csv", "overwrite=true", "phases=[evaluate]")[0]
    assert same.hash() == composed()[0].hash()
    assert composed("seed=1")[0].hash() != composed()[0].hash()
    assert composed("trainer.loss_chunk=7", "data.bucket=1")[0].hash() == composed()[0].hash()


def test_identity_of_runs_from_before_there_were_buckets():
    assert "bucket" not in composed()[0].identity()["data"]
    assert composed("data.bucket=8")[0].identity()["data"]["bucket"] == 8


@pytest.mark.parametrize("method", ["sleb", "shortgpt"])
def test_skipping_in_prefill_names_another_run(method: str):
    config, decode_only = composed(f"method={method}")
    assert "skip_prefill" not in config.identity()["method"] and decode_only.label == f"{method}-skip0.15"
    config, pruned = composed(f"method={method}", "method.skip_prefill=true")
    assert config.identity()["method"]["skip_prefill"] and pruned.label == f"{method}-skip0.15-prefill"


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
        ("lora.lora_alpha=0", r"lora\.lora_alpha=0 is not allowed"),
        ("lora.target_modules=[]", r"lora\.target_modules=\[\] is not allowed"),
        ("lora_phase.learning_rate=inf", r"lora_phase\.learning_rate=inf is not allowed"),
        ("router_phase.weight_decay=-1", r"router_phase\.weight_decay=-1\.0 is not allowed: at least 0"),
        ("router_phase.gradient_clip=0", r"router_phase\.gradient_clip=0\.0 is not allowed: greater than 0, or null"),
        ("evaluation.top_k=0", r"evaluation\.top_k=0 is not allowed: at least 1"),
        ("evaluation.temperature=inf", r"evaluation\.temperature=inf is not allowed"),
        ("evaluation.limit=0", r"evaluation\.limit=0 is not allowed"),
        ("evaluation.comet.batch_size=0", r"evaluation\.comet\.batch_size=0 is not allowed"),
        ("evaluation.bertscore.num_layers=0", r"evaluation\.bertscore\.num_layers=0 is not allowed"),
        ("trainer.precision=16-mixed", r"trainer\.precision='16-mixed' needs trainer\.accelerator=gpu"),
        ("seed=4294967296", r"seed=4294967296 is not allowed: .*below 2\*\*32"),
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


def test_a_logger_is_looked_at_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"logger\._target_='nothing\.here' cannot be imported"):
        composed("logger=csv", "logger._target_=nothing.here")
    with pytest.raises(ValueError, match=r"logger\.offline='maybe' is not allowed: it takes true or false"):
        composed("logger=wandb", "logger.offline=maybe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=sleb", "method.gate=hard"], "has no key 'gate'; its keys are _target_, target_skip, protect_first"),
        (["method=none", "method.target_skip=0.1"], "method has no key 'target_skip'; its keys are _target_"),
        (["logger=wandb", "logger.entiti=x"], "logger has no key 'entiti'; its keys are _target_, save_dir, project"),
        (["+experiment=squad_a0.01", "method.alhpa=1"], "method has no key 'alhpa'; its keys are _target_, alpha"),
        (["experiment=squad_a0.01"], "write +experiment=squad_a0.01"),
        (["data.task.test_size=3"], "pair; another argument of its class is added: +data.task.test_size="),
        (["--multirun", "+model.bogus=1"], "model.bogus is unknown: model has no key 'bogus'"),
        (["logger=[csv,wandb]"], "logger=[csv,wandb]: choose one of csv, none, tensorboard, wandb"),
        (["trainer=null"], "trainer=null: choose one of cpu, ddp, fsdp, gpu"),
    ],
)
def test_unknown_keys_are_answered_with_those_of_the_chosen_parts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit, match="2"):
        check_command_line("train", arguments)
    assert message in capsys.readouterr().err


def test_what_is_right_passes_the_command_line():
    check_command_line("train", ["+experiment=squad_a0.01", "method.alpha=1", "trainer=cpu"])
    check_command_line("train", ["data=mini_qa", "+data.task.test_size=3"])
    check_command_line("train", ["--multirun", "method=first,sleb", "+data.task.test_size=3"])
    check_command_line("train", ["--multirun", "method.target_skip=0.1,0.2"])


def test_a_folder_of_ones_own_is_searched_beside_the_bundled_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [parallel]\nname: mine\nval_size: 7\n")
    for option in (["--config-dir", str(tmp_path)], [f"-cd={tmp_path}"], search_path([str(tmp_path)])):
        check_command_line("train", [*option, "data=mine", "+data.task.root=x"])
        with pytest.raises(SystemExit, match="2"):
            check_command_line("train", [*option, "data=mine", "lora.rnk=1"])
        assert "lora has no key 'rnk'" in capsys.readouterr().err
    assert own_conf_dirs() == []
    with started_with(*search_path([str(tmp_path)])):
        assert own_conf_dirs() == [str(tmp_path)]
        assert composed_config(["data=mine"])["data"]["val_size"] == 7
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(composed()[0].to_dict()))
    mine = read(file, {"data": "mine", "data.root": "x"}, [str(tmp_path)])[0].data
    assert (mine.val_size, mine.root) == (7, "x")
    with pytest.raises(ValueError, match="data='mine' is unknown"):
        read(file, {"data": "mine"})


@pytest.mark.parametrize("text", ["", "a: [", "site: mine\n", "- a\n", b"\xff\xfe"])
def test_a_damaged_or_foreign_configuration_is_named(tmp_path: Path, text: str | bytes):
    file = tmp_path / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "router").mkdir()
    config, _ = composed()
    for use in (lambda: read(file), lambda: check_same(tmp_path, config)):
        with pytest.raises(ValueError, match=re.escape(str(file))):
            use()


def test_a_configuration_of_another_version_is_named(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(composed()[0].to_dict() | {"bogus": 1}))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*bogus"):
        read(file)


def test_overrides_of_a_saved_configuration(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(composed()[0].to_dict()))
    assert read(file, {"trainer": "gpu"})[0].trainer.accelerator == "gpu"
    assert read(file, {"evaluation.limit": "null"})[0].evaluation.limit is None
    captions = read(file, {"data": "multi30k"})[0].data  # a file that starts from another
    assert (captions.name, captions.task["train"], captions.max_length_router) == ("multi30k", "val", 128)
    for key, value, message in (
        ("evaluation.limit", "", "evaluation.limit= has no value; write evaluation.limit=null for none"),
        ("data.root", "[a", r"data.root=\[a is not valid YAML"),
        ("trainer", "tpu", "trainer='tpu' is unknown; choose one of cpu, ddp, fsdp, gpu"),
        ("evaluation", "fast", "evaluation is a group; give its keys, limit, batch_size"),
    ):
        with pytest.raises(ValueError, match=message):
            read(file, {key: value})


@pytest.mark.parametrize("argument", ["model.name=a/b", "data.name=../x", "note=a/b"])
def test_names_that_would_leave_the_folder_of_runs(argument: str):
    with pytest.raises(ValueError, match=r"is not allowed: letters, digits and \. = \+ - _"):
        composed(argument)


@dataclass
class Nameless(Method):
    """A method whose author forgot its name."""

    @property
    def label(self) -> str:
        return "nameless"

    def routes(self, prompts: Prompts) -> None:
        """Nothing."""


def test_a_method_needs_a_name():
    with pytest.raises(ValueError, match="test_config.Nameless': the class has no `name`"):
        composed("method=none", "method._target_=test_config.Nameless")
