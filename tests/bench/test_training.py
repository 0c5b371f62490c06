"""The measurement of training steps: a run from end to end on a tiny model, and errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import TrainingArguments

from firstlab.bench import training
from firstlab.bench.config import TrainingSpeedConfig, load
from firstlab.bench.models import Models
from firstlab.bench.report import run
from firstlab.bench.training import measure, random_rows, transformers_steps
from firstlab.config.compose import conf_dir
from firstlab.config.schema import SpeedModelConfig
from firstlab.model.settings import LoraSettings
from support.models import HIDDEN, LAYERS, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return path


def settings(folder: Path, **given: object) -> TrainingSpeedConfig:
    small = {"device": "cpu", "batch_size": 2, "prompt_length": 6, "response_length": 4, "warmup": 1, "steps": 2}
    small |= {"repetitions": 1, "model": SpeedModelConfig("tiny", str(folder))}
    return TrainingSpeedConfig(**{**small, **given})  # type: ignore[arg-type]


def test_from_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=hf", "model.name=tiny", f"model.path={folder}", "device=cpu", "batch_size=2", "lora.rank=2"]
    overrides += ["prompt_length=6", "response_length=4", "warmup=1", "steps=3", "repetitions=2", f"out={tmp_path}"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        run(load(compose("training_speed", [*overrides, "model.dtype=float32"])))
    printed = capsys.readouterr().out
    assert "tiny, batch 2, prompts of 6 and responses of 4 tokens, float32" in printed
    assert "peak memory is measured on CUDA devices only" in printed
    record = json.loads((tmp_path / "training_speed.json").read_text())
    assert (record["layers"], record["tokens_per_step"], record["labels_per_step"]) == (LAYERS, 20, 8)
    assert record["parameters"] == sum(each.numel() for each in tiny_model("llama").parameters())
    assert record["packages"]["torch"] and record["settings"]["lora"]["rank"] == 2
    rows = {row["variant"]: row for row in record["variants"]}
    assert set(rows) == {"plain", "phase_1", "phase_2"}
    # Rank 2 on query and output (32 to 32), key and value (32 to 16), gate and up (32 to 48), down (48 to 32).
    adapters = LAYERS * 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert rows["plain"]["trainable_parameters"] == rows["phase_2"]["trainable_parameters"] == adapters
    assert rows["phase_1"]["trainable_parameters"] == LAYERS * HIDDEN
    for row in rows.values():
        assert [len(steps) for steps in row["step_s_of_rounds"]] == [3, 3]
        assert row["tokens_per_s"] == pytest.approx(20 / row["step_s"])
        assert row["peak_memory_bytes"] is None and row["speedup_over_plain"] > 0
    assert rows["plain"]["speedup_over_plain"] == 1


def test_architecture_alone_with_checkpointing_and_half_precision(tmp_path: Path) -> None:
    tiny_model("gemma2").config.save_pretrained(tmp_path)
    model = SpeedModelConfig("tiny", str(tmp_path), dtype="bfloat16", random_init=True)
    record = measure(settings(tmp_path, model=model, gradient_checkpointing=True, loss_chunk=3))
    assert all(row["step_s"] > 0 for row in record["variants"])


def test_every_variant_trains_what_it_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = training._variants

    def spy(config: TrainingSpeedConfig, models: Models) -> object:
        seen.append((models, {name: value.clone() for name, value in models.routed.state_dict().items()}))
        return original(config, models)

    monkeypatch.setattr(training, "_variants", spy)
    measure(settings(folder, learning_rate=0.1, lora=LoraSettings(rank=2)))
    [(models, before)] = seen
    after = models.routed.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"routers.weight"}
    adapters = {name: value for name, value in models.plain.named_parameters() if "lora_B" in name}
    assert adapters and all(value.any() for value in adapters.values())


def test_a_plain_step_takes_one_batch_on_many_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up = TrainingArguments.__post_init__

    def with_four_gpus(arguments: TrainingArguments) -> None:
        set_up(arguments)
        arguments._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_four_gpus)
    config = settings(folder, warmup=1, steps=3)
    assert len(transformers_steps(tiny_model("llama"), config, random_rows(config, 97))) == 4


def test_rows(folder: Path) -> None:
    rows = random_rows(settings(folder), 97)
    assert len(rows) == 2 * 3
    for row in rows:
        assert row["prompt_mask"].tolist() == [1] * 6 + [0] * 4
        assert row["labels"].tolist() == [-100] * 6 + row["input_ids"][6:].tolist()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("device", "tpu"),
        ("objective", "hard"),
        ("gate", "none"),
        ("batch_size", 0),
        ("prompt_length", 0),
        ("response_length", 0),
        ("loss_chunk", 0),
        ("steps", 0),
        ("repetitions", 0),
        ("learning_rate", 0.0),
        ("gradient_clip", -1.0),
        ("warmup", -1),
    ],
)
def test_settings_out_of_range(folder: Path, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r} is (not allowed|unknown)"):
        settings(folder, **{option: value})


def test_settings_that_do_not_fit_the_model(folder: Path) -> None:
    with pytest.raises(ValueError, match="needs 129 positions, and model=tiny has 128"):
        measure(settings(folder, prompt_length=125))
    with pytest.raises(ValueError, match="is not available: no such folder"):
        measure(settings(folder, model=SpeedModelConfig("none", "no/such/folder", random_init=True)))


@pytest.mark.parametrize("arguments", [["--help"], ["training", "--help"]])
def test_the_command_shows_the_options_of_either_measurement(arguments: list[str]) -> None:
    code = "import runpy, sys; runpy.run_module('firstlab.benchmark', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("batch_sizes:" in done.stdout) is (arguments[0] != "training")
    assert ("hold_routes:" in done.stdout) is (arguments[0] == "training")
