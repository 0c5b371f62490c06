"""The recipes on disk, their checks, and the bundled model and tasks that they made."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from transformers import AutoTokenizer, LlamaForCausalLM

from firstlab.data.bundled import FOLDER
from firstlab.data.mini_translation import MiniTranslation
from freeze import TASKS, frozen
from recipe.finish import greedy_responses
from recipe.generated import GeneratedTask
from recipe.settings import EvaluationConfig, RecipeConfig, check, weight_settings

HERE = Path(__file__).resolve().parents[1]
ConfigStore.instance().store(name="recipe_schema", node=RecipeConfig)


def load(name: str, *overrides: str) -> RecipeConfig:
    with initialize_config_dir(str(HERE / "conf"), version_base="1.3"):
        raw = compose(name, overrides=list(overrides))
    OmegaConf.resolve(raw)
    config = OmegaConf.to_object(raw)
    assert isinstance(config, RecipeConfig)
    return config


def test_recipes_on_disk_are_sound() -> None:
    check(load("bundled", "compile=false"))
    parallel = load("parallel_text", "compile=false", "data_root=/some/where")
    check(parallel)
    assert parallel.tasks["parallel"].task["root"] == "/some/where"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stages.words.steps=0", "training.stages.words.steps=0 must be at least 1"),
        ("training.stages.words.weights.mini_qa=0", "training.stages.words.weights.mini_qa=0.0 must be above 0"),
        ("+training.stages.words.weights.mini=1", "training.stages.words.weights.mini is for none of tasks="),
        ("device=tpu", "device=tpu must be auto, cpu or cuda"),
        ("precision=fp8", "precision=fp8 must be auto, fp32 or bf16"),
        ("training.max_length=4000", "training.max_length=4000 must not exceed"),
        ("training.stages.words.decay_fraction=2", "training.stages.words.decay_fraction=2.0 must be between 0 and 1"),
        ("processes=3", "training.batches_per_step=2 must be a multiple of processes=3"),
    ],
)
def test_impossible_settings_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        check(load("bundled", "compile=false", override))


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"compile=true needs a C\+\+ compiler"):
        check(load("bundled"))
    check(load("bundled", "compile=false"))


def test_a_run_without_stages_is_refused() -> None:
    config = load("bundled", "compile=false")
    config.training.stages = {}
    with pytest.raises(ValueError, match=r"training\.stages is empty"):
        check(config)


BUNDLED = FOLDER.parent / "nano"


def test_bundled_model_is_what_the_recipe_makes() -> None:
    record = json.loads((BUNDLED / "nano.json").read_text())
    config = load("bundled")
    assert record["recipe"] == weight_settings(config)
    assert (BUNDLED / "model.safetensors").stat().st_size <= 12e6
    model, tokenizer = LlamaForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers >= 16
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert not model.generation_config.do_sample


def test_bundled_model_translates() -> None:
    model, tokenizer = LlamaForCausalLM.from_pretrained(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    task = MiniTranslation("en-de", pool_size=1, test_size=40)
    easy = [example for example in task.test() if example.difficulty == 1]
    config = EvaluationConfig(examples=0, batch_size=40, max_new_tokens=40)
    answers = greedy_responses(model, tokenizer, [task.prompt(example) for example in easy], config)
    assert np.mean([answer in e.references for answer, e in zip(answers, easy, strict=True)]) > 0.5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_generator_still_gives_the_frozen_file(task: GeneratedTask) -> None:
    assert lzma.decompress((FOLDER / f"{task.name}.jsonl.xz").read_bytes()) == frozen(task)


def test_every_frozen_file_has_a_generator() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{task.name}.jsonl.xz" for task in TASKS}
