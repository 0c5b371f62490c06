"""What is composed, and what runs saved, is checked: one message that names the option and the way out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra.errors import ConfigCompositionException

from firstlab.config.command_line import parse_options
from firstlab.config.compose import composed_config, load_dict, own_conf_dirs, search_path
from firstlab.config.schema import GenerateConfig
from firstlab.methods.base import Method, Prompts
from firstlab.run.directory import check_same
from firstlab.run.load import read
from support.tiny_run import composed, flat, started_with


def test_unknown_keys_and_wrong_types_stop_at_composition():
    with pytest.raises(ConfigCompositionException, match="alhpa"):
        composed("method.alhpa=1")
    with pytest.raises(ConfigCompositionException, match="batch_size"):
        composed("router_phase.batch_size=many")


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


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora.rnk", "lora.rnk is unknown: lora has no key 'rnk'; its keys are rank, lora_alpha"),
        ("model.bogus", "model.bogus is unknown: model has no key 'bogus'"),
        ("bogus", "bogus is unknown: the configuration has no key 'bogus'; its keys are model, data"),
    ],
)
def test_keys_that_a_plus_adds_are_checked_as_well(key: str, message: str):
    with pytest.raises(ValueError, match=message):
        composed(f"+{key}=1")


@pytest.mark.parametrize("value", ["0", "1", "-2"])
def test_numbers_are_no_booleans(tmp_path: Path, value: str):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(composed()[0].to_dict()))
    with pytest.raises(ValueError, match="takes true or false"):
        read(file, {"evaluation.do_sample": value})
    assert read(file, {"evaluation.do_sample": "true", "seed": "1"})[0].evaluation.do_sample


def test_a_tilde_is_the_home_folder_in_every_option(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("run_dir", "runs", "init_from", "model.path", "data.root", "data.task.root", "sweep.collect")
    config, _ = composed("data=parallel", 'sweep.recorded="~"', *(f'{key}="~/x"' for key in keys))
    found = flat(config.to_dict())
    assert [found[f".{key}"] for key in keys] == ["/home/me/x"] * len(keys) and config.sweep.recorded == "/home/me"
    assert parse_options(GenerateConfig(), ["run=~/r", "text"])[0].run == "/home/me/r"


def test_a_logger_is_looked_at_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"logger\._target_='nothing\.here' cannot be imported"):
        composed("logger=csv", "logger._target_=nothing.here")
    with pytest.raises(ValueError, match=r"logger\.offline='maybe' is not allowed: it takes true or false"):
        composed("logger=wandb", "logger.offline=maybe")
    with pytest.raises(ValueError, match=r"logger\.log_model is unknown: .*CSVLogger takes save_dir"):
        composed("logger=csv", "+logger.log_model=true")


def test_a_folder_of_ones_own_is_searched_beside_the_bundled_one(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("defaults: [parallel]\nname: mine\nval_size: 7\n")
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


@dataclass
class Nameless(Method):
    """A method whose author forgot its name."""

    @property
    def label(self) -> str:
        return "nameless"

    def routes(self, prompts: Prompts) -> None:
        """Nothing."""


def test_a_method_needs_a_name():
    with pytest.raises(ValueError, match="Nameless': the class has no `name`"):
        composed("method=none", f"method._target_={__name__}.Nameless")
