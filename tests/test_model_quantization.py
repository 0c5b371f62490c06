"""Quantized layers: the engine's tokens are those of `generate`, the bytes are those stored, training is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from firstlab import RouterAugmentedLM, generate
from firstlab.benchmark import BenchmarkConfig, measure
from firstlab.config import ModelConfig, SpeedModelConfig
from firstlab.experiment import Experiment
from firstlab.model import LoraSettings, quantization
from firstlab.model.engine import DecodeEngine
from firstlab.model.quantization import is_quantized, quantize, stored_bytes
from firstlab.speed import read_bytes
from models import random_routes, routed_model, tiny_model
from tape import Tape
from tiny_run import composed, overrides

WITHOUT = "torchao is not installed: pip install 'firstlab[quantization]'"
PROMPTS = [[5, 9, 33], [8, 41, 7, 60, 3, 12], [90], [4, 4, 17, 22]]


def quantized(architecture: str = "llama") -> RouterAugmentedLM:
    pytest.importorskip("torchao", reason=WITHOUT)
    model = routed_model(architecture)
    quantize(model.lm, "int8")
    return model


def expected(model: RouterAugmentedLM, prompt: list[int], route: Any) -> list[int]:
    out = model.generate(torch.tensor([prompt]), routes=route, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_engine_gives_the_tokens_of_generate(architecture: str, mode: str) -> None:
    model = quantized(architecture)
    engine: Any = DecodeEngine(model, 20, 3, mode)
    if mode == "graphs":
        engine.step._graphs = Tape()  # after the first time it reads fixed memory only
    for routes in (None, random_routes(len(PROMPTS)), random_routes(len(PROMPTS), seed=6)):
        out = engine.generate(PROMPTS, 8, routes)
        for row, prompt in enumerate(PROMPTS):
            assert out.tokens[row] == expected(model, prompt, None if routes is None else routes[row])


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_keys_and_values_alone_are_those_of_the_whole_projection(architecture: str) -> None:
    step: Any = DecodeEngine(quantized(architecture), 20, 3, "eager").step
    x, layer = torch.randn(3, 32), step.layers[1]
    with torch.no_grad():
        whole = layer.project(x, step.cos[4:5], step.sin[4:5])
        torch.testing.assert_close(layer.project_keys_values(x, step.cos[4:5], step.sin[4:5]), whole[:, step.heads :])


@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_engine_made_before_quantizing_is_refused(mode: str) -> None:
    pytest.importorskip("torchao", reason=WITHOUT)
    model = routed_model()
    engine = DecodeEngine(model, 20, 3, mode)
    quantize(model.lm, "int8")
    with pytest.raises(ValueError, match="make a new DecodeEngine"):
        engine.generate(PROMPTS, 8)
    engine = DecodeEngine(model, 20, 3, mode)
    model.lm.to(torch.float64)
    with pytest.raises(ValueError, match="make a new DecodeEngine"):
        engine.generate(PROMPTS, 8)


def test_only_the_layers_linear_maps_change_and_by_rounding_alone() -> None:
    before, model = routed_model(), quantized()
    after = dict(model.named_modules())
    for name, module in before.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        new: Any = after[name].weight
        if ".layers." not in name:
            assert type(new) is nn.Parameter and torch.equal(new, module.weight)
            continue
        rows = module.weight.detach()
        assert stored_bytes(new) < rows.nbytes / 2
        step = rows.abs().amax(1, keepdim=True) / 127
        assert ((new.dequantize() - rows).abs() <= 0.51 * step).all()
    assert torch.equal(before.routers.weight, model.routers.weight)
    assert torch.equal(before.lm.get_input_embeddings().weight, model.lm.get_input_embeddings().weight)


def test_bytes_of_a_step_count_integers_and_scales() -> None:
    model, route = quantized(), torch.ones(6, dtype=torch.bool)
    without = route.clone()
    without[2] = False
    plain, small = ([read_bytes(lm, each, 1, 0) for each in (route, without)] for lm in (tiny_model("llama"), model.lm))
    layer = model.lm.model.layers[2]
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    numbers, rows = sum(each.weight.numel() for each in linears), sum(each.out_features for each in linears)
    # One byte a number instead of four; a scale a row, and torchao's zero point, of at most four bytes each.
    assert plain[0] - plain[1] - 3 * numbers + 4 * rows <= small[0] - small[1]
    assert small[0] - small[1] <= plain[0] - plain[1] - 3 * numbers + 8 * rows


def test_benchmark_of_quantized_layers(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason=WITHOUT)
    tiny_model("llama").save_pretrained(tmp_path)

    def row(name: str | None) -> dict[str, Any]:
        model = SpeedModelConfig("tiny", str(tmp_path), quantization=name)
        small: dict[str, Any] = {"batch_sizes": [1], "prompt_lengths": [6], "tokens": 3, "skip_rates": [0.33]}
        config = BenchmarkConfig(model=model, device="cpu", repetitions=1, copy_mib=1, **small)
        rows = measure(config)["cells"][0]["variants"]
        assert {each["decoder"] for each in rows} == {"transformers", "generate", "engine"}
        return rows[-1]

    assert row("int8")["bytes_per_step"] < 0.6 * row(None)["bytes_per_step"]


def test_what_cannot_be_quantized(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"quantization='int3' is unknown: choose one of int8, or null"):
        ModelConfig("tiny", "somewhere", quantization="int3")
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'firstlab\[quantization\]'"):
        ModelConfig("tiny", "somewhere", quantization="int8")
    with pytest.raises(SystemExit, match="2"):
        generate.main(["run=nowhere", "quantization=int8", "text"])
    assert "firstlab[quantization]" in capsys.readouterr().err
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    model = routed_model()
    model.add_lora()
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) first"):
        quantize(model.lm, "int8")
    with pytest.raises(ValueError, match="have no nn.Linear"):
        quantize(tiny_model("gpt2"), "int8")


def test_lora_on_quantized_layers_and_saving_them_are_refused(tmp_path: Path) -> None:
    model = quantized()
    assert is_quantized(model)
    with pytest.raises(ValueError, match="the model is quantized"):
        model.add_lora(LoraSettings())
    with pytest.raises(ValueError, match="save it before quantizing"):
        model.save_pretrained(tmp_path, save_base=True)


def test_training_is_refused_and_null_is_no_part_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    given = overrides(tmp_path, tmp_path)
    config, method = composed(*given)
    assert "quantization" not in config.identity()["model"]
    smaller, _ = composed(*given, "model.quantization=int8")
    assert smaller.identity()["model"]["quantization"] == "int8" and smaller.hash() != config.hash()
    with pytest.raises(ValueError, match="model.quantization='int8' is for decoding, and this trains"):
        Experiment(smaller, method)
