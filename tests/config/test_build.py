"""What a configuration asks of a model is checked as soon as the model is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from firstlab.config.build import (
    build_data,
    build_task,
    check_lengths,
    check_test_set,
    check_vocabulary,
    load_model,
)
from firstlab.data.mini_qa import MiniQA
from firstlab.model.storage import load_tokenizer
from firstlab.run.decisions import shared_routes
from firstlab.run.directory import taken_over
from firstlab.run.experiment import Experiment
from firstlab.run.load import load_run
from support.models import pair
from support.tiny_run import composed, overrides, save_tiny_model


@pytest.mark.parametrize(
    ("architecture", "positions"), [("gpt2", 128), ("opt", 128), ("gptj", 128), ("llama", None), ("mistral", None)]
)
def test_absolute_positions_are_limited(architecture: str, positions: int | None):
    assert pair(architecture)[1].max_positions == positions


def test_lengths_beyond_the_models_positions_are_named(tmp_path: Path):
    config, _ = composed(*overrides(tmp_path, tmp_path))
    check_lengths(config, None)
    check_lengths(config, 256)
    for option, value, message in (
        ("data.max_length_router", 257, "data.max_length_router=257 exceeds the 256 positions"),
        ("data.max_length_lora", 257, "data.max_length_lora=257 exceeds the 256 positions"),
        ("data.max_prompt_length", 251, r"data.max_prompt_length plus new tokens=257 exceeds the 256 positions"),
    ):
        config, _ = composed(*overrides(tmp_path, tmp_path, f"{option}={value}"))
        with pytest.raises(ValueError, match=message):
            check_lengths(config, 256)


def test_a_revision_is_for_models_of_the_hub(tiny_model_dir: Path, tmp_path: Path):
    for model in (str(tiny_model_dir), "bundled:nano"):
        with pytest.raises(
            ValueError, match="model.revision='v2' is for models of the hub, and model.path=.* a folder"
        ):
            composed(*overrides(tiny_model_dir, tmp_path, f"model.path={model}", "model.revision=v2"))


def test_the_tokenizer_has_the_models_revision(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda *a, **k: (asked.append(k.get("revision")), load(tiny_model_dir))[1]
    )
    build_data(composed(*overrides(Path("hub/model"), tmp_path, "model.revision=v2"))[0])
    assert asked == ["v2"]


def test_a_tokenizer_with_more_entries_than_the_model_is_named(tiny_model_dir: Path, tmp_path: Path):
    config, _ = composed(*overrides(tiny_model_dir, tmp_path))
    model, tokenizer = load_model(config, tiny_model_dir), load_tokenizer(tiny_model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(config, tokenizer, model)
    tokenizer.add_tokens(["firstlab"])
    rows = len(tokenizer) - 2
    with pytest.raises(ValueError, match=f"model.path=.* has {rows + 2} entries, but the model embeds {rows};"):
        check_vocabulary(config, tokenizer, model)


@pytest.fixture
def trained_run(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with trained routers, started with a relative path of its model."""
    shutil.copytree(tiny_model_dir, tmp_path / "there" / "base")
    monkeypatch.chdir(tmp_path / "there")
    run = Experiment(*composed(*overrides(Path("base"), Path("runs"), "phases=[router]", "run_dir=run")))
    with taken_over(run.directory, run.config):
        pass
    load_model(run.config, "base").save_pretrained("run/router")
    Experiment(*composed(*overrides(Path("base"), Path("runs"), "phases=[router]", "run_dir=run")))  # the same run
    return tmp_path / "there" / "run"


def test_a_relative_model_is_found_from_anywhere(trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert load_run(trained_run, None).variant == "router"


def test_a_run_that_began_from_a_saved_model_is_that_model(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(trained_run.parent)
    arguments = overrides(Path("base"), Path("runs"), "phases=[evaluate]", "run_dir=other", "init_from=run/router")
    other = Experiment(*composed(*arguments))
    with taken_over(other.directory, other.config):
        pass
    Experiment(*composed(*arguments))  # the same run
    saved = load_run(trained_run, None).model
    saved.routers.weight.data += 1
    saved.save_pretrained(trained_run / "router")
    monkeypatch.chdir(tmp_path)
    run = load_run(trained_run.with_name("other"), None)
    assert run.variant == "router" and torch.equal(run.model.routers.weight, saved.routers.weight)
    (trained_run / "router").rename(trained_run / "moved")
    with pytest.raises(ValueError, match="init_from='.*router' is not there any more; put it back, or .*variant=base"):
        load_run(trained_run.with_name("other"), None)
    assert load_run(trained_run.with_name("other"), "base").variant == "base"


def test_a_moved_base_can_be_named(trained_run: Path, tmp_path: Path):
    (tmp_path / "there" / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="if the base model has moved, give model.path=FOLDER"):
        load_run(trained_run, None)
    run = load_run(trained_run, None, {"model.path": str(tmp_path / "moved")})
    assert run.variant == "router" and run.model.num_layers == 4
    save_tiny_model(tmp_path / "other", num_layers=2)
    with pytest.raises(ValueError, match="do not fit a base model"):
        load_run(trained_run, None, {"model.path": str(tmp_path / "other")})


def test_a_saved_run_is_evaluated_by_one_process(trained_run: Path):
    with pytest.raises(ValueError, match="trainer.devices=2, .*: a saved run is evaluated by one process"):
        load_run(trained_run, None, {"trainer": "ddp"})
    config = trained_run / "config.yaml"
    saved = yaml.safe_load(config.read_text())
    saved["trainer"] |= {"devices": 2, "strategy": "ddp"}
    config.write_text(yaml.safe_dump(saved))
    assert load_run(trained_run, None, {"trainer.progress_bar": "true"}).config.trainer.devices == 2


def test_training_needs_validation(tiny_model_dir: Path, tmp_path: Path):
    Experiment(*composed(*overrides(tiny_model_dir, tmp_path, "data.val_size=0", "phases=[evaluate]")))
    for phase in ("router", "lora"):
        with pytest.raises(ValueError, match="data.val_size=0: training .* at least 1"):
            Experiment(*composed(*overrides(tiny_model_dir, tmp_path, "data.val_size=0", f"phases=[{phase}]")))


class Riddles(MiniQA):
    """A task of a kind that nobody scores."""

    kind = "riddle"


def test_lora_on_maps_that_the_model_lacks_stops_before_anything_loads(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    given = overrides(tiny_model_dir, tmp_path, "lora.target_modules=[q_proj,v_porj]")
    run = Experiment(*composed(*given))
    monkeypatch.setattr("firstlab.config.build.load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"lora\.target_modules=.* no linear map v_porj; choose from q_proj"):
        run.run()


def test_a_task_of_unknown_kind_is_named(tmp_path: Path):
    config, _ = composed(*overrides(tmp_path, tmp_path, "data=mini_qa", f"data.task._target_={__name__}.Riddles"))
    with pytest.raises(ValueError, match="kind of Riddles is 'riddle'.*choose one of translation, summarization, qa"):
        build_task(config)


def test_a_start_beyond_probabilities_is_named(tiny_model_dir: Path, tmp_path: Path):
    arguments = overrides(tiny_model_dir, tmp_path, "method.start=static", "method.target_skip=0.25")
    Experiment(*composed(*arguments, "router.threshold=0.8"))
    with pytest.raises(ValueError, match=r"start_margin=0.1 on both sides of router.threshold=0.9 leaves"):
        Experiment(*composed(*arguments, "router.threshold=0.9"))
    Experiment(*composed(*arguments, "router.threshold=0.9", "phases=[evaluate]"))  # of routers that are there


def test_an_empty_test_set_is_named(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = build_data(composed(*overrides(tiny_model_dir, tmp_path))[0])
    monkeypatch.setattr(data.task, "test", list)
    with pytest.raises(ValueError, match="has no test examples; leave evaluate out of phases"):
        check_test_set(data)


@pytest.mark.parametrize("routes", [torch.ones(3, dtype=torch.bool), torch.ones(4)])
def test_routes_of_another_shape_are_not_kept(tmp_path: Path, routes: torch.Tensor):
    _, method = composed("method=sleb")
    method.routes = lambda _: routes
    with pytest.raises(ValueError, match=r"method sleb: routes\(\) gave .* must give torch.bool of shape \[4\]"):
        shared_routes(tmp_path, method, SimpleNamespace(num_layers=4))
    assert not (tmp_path / "routes.json").exists()
