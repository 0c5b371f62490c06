"""Quantized layers: the engine's tokens are those of `generate`, the bytes are those stored, training is refused."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from firstlab import generate
from firstlab.bench.config import BenchmarkConfig, load
from firstlab.bench.models import Models
from firstlab.bench.report import run
from firstlab.bench.workload import read_bytes
from firstlab.config.compose import conf_dir
from firstlab.config.schema import ModelConfig, SpeedModelConfig
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.graph_step import GraphStep
from firstlab.engine.graphs import Graphs
from firstlab.engine.llama_step import LlamaStep
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.quantization import (
    Int4Linear,
    Int8Linear,
    is_quantized,
    quantize,
    stored_bytes,
    to_int4,
    to_int8,
)
from firstlab.model.settings import LoraSettings
from firstlab.run.experiment import Experiment
from support.models import random_routes, routed_model, tiny_model
from support.tape import Tape
from support.tiny_run import composed, overrides

PROMPTS = [[5, 9, 33], [8, 41, 7, 60, 3, 12], [90], [4, 4, 17, 22]]


BOTH = pytest.mark.parametrize("name", ["int8", "int4"])


def quantized(name: str, architecture: str = "llama") -> RouterAugmentedLM:
    model = routed_model(architecture)
    quantize(model.lm, name)
    return model


def expected(model: RouterAugmentedLM, prompt: list[int], route: Any) -> list[int]:
    out = model.generate(torch.tensor([prompt]), routes=route, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@BOTH
@torch.no_grad()
def test_weights_are_those_of_torchao(name: str) -> None:
    """Results that were recorded with its weights stay what they are."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    from torchao.quantization.utils import groupwise_affine_quantize_tensor

    for dtype in (torch.float32, torch.bfloat16):
        linear = nn.Linear(64, 48, dtype=dtype)
        if name == "int8":
            found = to_int8(linear.weight)
            quantize_(linear, Int8WeightOnlyConfig())
            theirs: Any = linear.weight
            wanted = theirs.qdata, theirs.scale.flatten()
        else:
            found, wanted = to_int4(linear.weight), groupwise_affine_quantize_tensor(linear.weight, 4, 32, dtype)
        assert all(torch.equal(*each) for each in zip(found, wanted, strict=True))


@BOTH
@torch.no_grad()
def test_steps_through_kernels(name: str) -> None:
    """The way of a GPU: our kernels read 8-bit weights, the library those of 4 bits, in replays of one step."""
    pytest.importorskip("triton")
    lm, tape = quantized(name, "qwen2").lm, Tape()
    eager, kernels = LlamaStep(lm, 3, 80), GraphStep(lm, 3, 80, tape, "kernels")
    assert (kernels.layers[0].gate_up.weight is None) == (name == "int4") and not kernels._mask.numel()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 2, length, 8, generator=generator) for length in (70, 9, 3)]
    for step in (eager, kernels):
        for route, kv in zip(([0, 1], [], [1, 2]), rows, strict=True):
            step.join(dict.fromkeys(route, kv), kv.shape[2])
    for token in range(2):
        tokens, made = torch.tensor([10 + token, 20, 30]), len(tape)
        # The library's kernel rounds x and the product with integers to bfloat16.
        torch.testing.assert_close(kernels(tokens), eager(tokens), atol=0.05, rtol=0.05)
    assert len(tape) == made
    GraphStep(lm, 3, 80, Tape(), "kernels")  # fuses nothing anew
    assert eager.is_current() and kernels.is_current()


def test_scales_keep_their_type() -> None:
    module = Int8Linear(nn.Linear(32, 16)).to(torch.bfloat16)
    assert (module.weight.dtype, module.scale.dtype, module.bias.dtype) == (torch.int8, torch.float32, torch.bfloat16)


@BOTH
@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
def test_engine_gives_the_tokens_of_generate(architecture: str, mode: str, name: str) -> None:
    model = quantized(name, architecture)
    engine: Any = DecodeEngine(model, 20, 3, mode)
    if mode == "graphs":
        engine.step._graphs = Tape()  # after the first time it reads fixed memory only
    for routes in (None, random_routes(len(PROMPTS)), random_routes(len(PROMPTS), seed=6)):
        out = engine.generate(PROMPTS, 8, routes)
        for row, prompt in enumerate(PROMPTS):
            assert out.tokens[row] == expected(model, prompt, None if routes is None else routes[row])


@BOTH
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_keys_and_values_alone_are_those_of_the_whole_projection(architecture: str, name: str) -> None:
    step: Any = DecodeEngine(quantized(name, architecture), 20, 3, "eager").step
    x, layer = torch.randn(3, 32), step.layers[1]
    with torch.no_grad():
        whole = layer.project(x, step.cos[4:5], step.sin[4:5])
        torch.testing.assert_close(layer.project_keys_values(x, step.cos[4:5], step.sin[4:5]), whole[:, step.heads :])


@BOTH
@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_engine_made_before_quantizing_is_refused(mode: str, name: str) -> None:
    model = routed_model()
    engine = DecodeEngine(model, 20, 3, mode)
    quantize(model.lm, name)
    with pytest.raises(ValueError, match="make a new DecodeEngine"):
        engine.generate(PROMPTS, 8)
    engine = DecodeEngine(model, 20, 3, mode)
    model.lm.to(torch.float64)
    with pytest.raises(ValueError, match="make a new DecodeEngine"):
        engine.generate(PROMPTS, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_product_with_integers(dtype: torch.dtype, biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-128, 128, (7, 48), dtype=torch.int8, generator=generator)
    scales = torch.rand(7, generator=generator) + 0.1
    x = torch.randn(2, 9, 48, generator=generator).to(dtype)
    bias = torch.randn(7, generator=generator).to(dtype) if biased else None
    module = Int8Linear(nn.Linear(48, 7))
    module.weight.data, module.scale.data, module.bias = integers, scales, bias if bias is None else nn.Parameter(bias)
    out = module(x)
    assert out.dtype == dtype
    rows, expanded = x.to(torch.bfloat16).double(), integers.double() * scales.double().unsqueeze(1)
    expected = rows @ expanded.T
    # Rounding to bfloat16 and to the type, and that of float32 sums.
    allowed = expected.abs() * (2**-8 + 2 * torch.finfo(dtype).eps) + 1e-5 * (rows.abs() @ expanded.abs().T)
    if bias is not None:
        expected = expected + bias.double()
        allowed = allowed + expected.abs() * torch.finfo(dtype).eps
    assert ((out.double() - expected).abs() <= allowed).all()
    # A row's result depends neither on its neighbours nor on how it lies in memory.
    apart = [module(row.unsqueeze(0)) for row in x.view(18, 48)]
    assert torch.equal(torch.cat(apart).view_as(out), out)
    assert torch.equal(module(x.transpose(0, 1)), out.transpose(0, 1))
    assert torch.equal(module(x.mT.contiguous().mT), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_product_with_four_bits(dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 48, biased, dtype=dtype)
    module, x = Int4Linear(linear), torch.randn(2, 9, 96).to(dtype)
    # By hand: 16 steps from the least to the largest number of a group, each number at the nearest.
    groups = linear.weight.detach().double().view(48, 3, 32)
    least, largest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (largest - least) / 15
    expanded = (least + ((groups - least) / step).round() * step).view(48, 96)
    with torch.no_grad():
        out = module(x)
        identity = module(torch.eye(96, dtype=dtype)).T
    if biased:
        identity = identity - linear.bias[:, None]
    eps = torch.finfo(dtype).eps
    # Scales and zeros are rounded to the type, too, which may move a number that lies between two steps.
    off = (identity.double() - expanded).abs() - 40 * eps * groups.abs().amax()
    assert (off <= step.repeat_interleave(32, -1).view(48, 96)).all() and (off <= 0).double().mean() > 0.9
    expected = x.double() @ identity.double().T + (linear.bias.double() if biased else 0)
    allowed = 4 * eps * (x.double().abs() @ identity.double().abs().T + 1)
    assert out.dtype == dtype and ((out.double() - expected).abs() <= allowed).all()
    # A row's result depends neither on its neighbours nor on how it lies in memory.
    with torch.no_grad():
        apart = [module(row.unsqueeze(0)) for row in x.view(18, 96)]
        assert torch.equal(torch.cat(apart).view_as(out), out)
        assert torch.equal(module(x.transpose(0, 1)), out.transpose(0, 1))
        assert torch.equal(module(x.mT.contiguous().mT), out)
    assert stored_bytes(module.weight) + stored_bytes(module.scales_and_zeros) == 48 * 96 // 2 + 48 * 3 * 2 * x.itemsize


def test_maps_that_do_not_fit_four_bits_stay_whole() -> None:
    lm: Any = tiny_model("llama")
    mlp = lm.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 40), nn.Linear(32, 40), nn.Linear(40, 32)
    before = lm.state_dict()
    quantize(lm, "int4")
    for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        assert type(each) is nn.Linear
    assert isinstance(lm.model.layers[0].self_attn.q_proj, Int4Linear)
    assert torch.equal(mlp.gate_proj.weight, before["model.layers.0.mlp.gate_proj.weight"])


def test_four_bits_for_no_map_at_all_are_refused() -> None:
    lm: Any = tiny_model("llama")
    for parent in list(lm.model.layers.modules()):
        for child, module in parent.named_children():
            if isinstance(module, nn.Linear):
                parent.set_submodule(child, nn.Linear(40, 40))
    with pytest.raises(ValueError, match="quantization='int4': no linear map has inputs in groups of 32.*use int8"):
        quantize(lm, "int4")


def dequantized(module: Int8Linear) -> torch.Tensor:
    return module.weight * module.scale.unsqueeze(1)


def test_rows_of_blocks_take_the_kernel_and_others_are_expanded() -> None:
    lm: Any = tiny_model("llama")
    mlp = lm.model.layers[0].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = nn.Linear(32, 36), nn.Linear(32, 36), nn.Linear(36, 32)
    plain = {name: module for name, module in lm.model.layers.named_modules() if isinstance(module, nn.Linear)}
    quantize(lm, "int8")
    for name, old in plain.items():
        new: Any = lm.model.layers.get_submodule(name)
        x, weight = torch.randn(5, old.in_features), dequantized(new)
        with torch.no_grad():
            expected, out = nn.functional.linear(x, weight, old.bias), new(x)
        # Inputs, expanded weights and the result may each be rounded to bfloat16.
        assert ((out - expected).abs() <= 2**-8 * (x.abs() @ weight.abs().T) + 2**-8 * expected.abs()).all()


def test_only_the_layers_linear_maps_change_and_by_rounding_alone() -> None:
    before, model = routed_model(), quantized("int8")
    after = dict(model.named_modules())
    for name, module in before.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        new: Any = after[name]
        if ".layers." not in name:
            assert type(new) is nn.Linear and torch.equal(new.weight, module.weight)
            continue
        rows = module.weight.detach()
        assert stored_bytes(new.weight) == rows.nbytes / 4
        step = rows.abs().amax(1, keepdim=True) / 127.5
        assert ((dequantized(new) - rows).abs() <= 0.51 * step).all()
    assert torch.equal(before.routers.weight, model.routers.weight)
    assert torch.equal(before.lm.get_input_embeddings().weight, model.lm.get_input_embeddings().weight)


def test_bytes_of_a_step_count_integers_and_scales() -> None:
    model, route = quantized("int8"), torch.ones(6, dtype=torch.bool)
    without = route.clone()
    without[2] = False
    plain, small = ([read_bytes(lm, each, 1, 0) for each in (route, without)] for lm in (tiny_model("llama"), model.lm))
    layer = model.lm.model.layers[2]
    weights = [module.weight for module in layer.modules() if isinstance(module, Int8Linear)]
    numbers, rows = sum(each.numel() for each in weights), sum(len(each) for each in weights)
    assert len(weights) == 7
    # One byte a number instead of four, and a scale a row.
    assert small[0] - small[1] == plain[0] - plain[1] - 3 * numbers + 4 * rows


def benchmark_settings(folder: Path, **given: Any) -> BenchmarkConfig:
    small: dict[str, Any] = {"batch_sizes": [1], "prompt_lengths": [6], "tokens": 3, "skip_rates": [0.33]}
    model = SpeedModelConfig("tiny", str(folder), quantization=given.pop("quantization", None))
    return BenchmarkConfig(model=model, device="cpu", repetitions=2, copy_mib=1, **{**small, **given})


def test_benchmark_of_quantized_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = tiny_model("llama")
    lm.save_pretrained(tmp_path)
    every = [None, "int8", "int4"]
    settings = {"quantizations": every, "mixed_routes": [2], "mixed_batch_size": 3, "queue": 4, "out": str(tmp_path)}
    run(benchmark_settings(tmp_path, **settings))
    record = json.loads((tmp_path / "benchmark.json").read_text())
    printed = capsys.readouterr().out
    assert "engine int8" in printed and "(int8)" in printed and "2 routes, int8, batch 3" in printed
    assert "batch 8, int4, 33.3 % skipped" in printed
    assert [row["quantization"] for row in record["mixed_routes"]] == every
    variants = record["cells"][0]["variants"]
    rows = {(row["quantization"], row["decoder"], row["skip_rate_asked"]): row for row in variants}
    ways = [("transformers", 0), *((decoder, rate) for decoder in ("generate", "engine") for rate in (0, 0.33))]
    assert set(rows) == {(name, *way) for name in every for way in ways}
    for way in ways:
        assert rows[("int4", *way)]["bytes_per_step"] < 0.7 * rows[(None, *way)]["bytes_per_step"]
    quantize(lm, "int8")
    for way in ways:
        large, small = (rows[(name, *way)] for name in (None, "int8"))
        assert small["bytes_per_step"] < 0.6 * large["bytes_per_step"]
        route = torch.tensor([layer not in small["skipped_layers"] for layer in range(6)])
        assert small["bytes_per_step"] == read_bytes(lm, route, 1, 7.5)
        assert small["limit_ratio"] == read_bytes(lm, route, 1, 7.5) / read_bytes(lm, torch.ones_like(route), 1, 7.5)
        plain, both, whole = (
            np.array(row["tpot_mean_s_of_repetitions"]) for row in (large, small, rows["int8", way[0], 0])
        )
        assert small["tpot_ratio"] == np.median(both / whole)
        assert small["speedup_over_unquantized"] == np.median(plain / both)
        assert large["speedup_over_unquantized"] == 1


@BOTH
def test_quantized_after_an_engine_was_made(name: str) -> None:
    lm = tiny_model("llama")
    plain = deepcopy(lm)
    DecodeEngine(RouterAugmentedLM(lm), 16)
    quantize(lm, name)
    quantize(plain, name)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(lm(ids).logits, plain(ids).logits)
    assert len(lm.state_dict()) == len(plain.state_dict())


@BOTH
def test_models_share_what_is_not_quantized(name: str) -> None:
    lm = tiny_model("llama")
    models = Models(deepcopy(lm), RouterAugmentedLM(lm))
    assert models.quantized(None) is models
    before = {name: parameter.clone() for name, parameter in models.plain.named_parameters()}
    smaller = models.quantized(name)
    assert not is_quantized(models.plain) and is_quantized(smaller.plain) and is_quantized(smaller.routed)
    assert all(torch.equal(parameter, before[key]) for key, parameter in models.plain.named_parameters())
    own = {id(parameter) for parameter in models.plain.parameters()}
    for key, parameter in smaller.plain.named_parameters():
        # Its 48 inputs are no whole groups of 4-bit numbers.
        stays = "_proj" not in key or (name == "int4" and "down_proj" in key)
        assert (id(parameter) in own) == stays


def test_benchmark_settings_for_quantization(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"quantizations=\[\] is not allowed"):
        benchmark_settings(tmp_path, quantizations=[])
    with pytest.raises(ValueError, match="quantization='int3' is unknown"):
        benchmark_settings(tmp_path, quantizations=[None, "int3"])
    with pytest.raises(ValueError, match=r"model.quantization='int8'.*use quantizations=\[null,int8\]"):
        benchmark_settings(tmp_path, quantization="int8")
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        assert load(compose("benchmark", ["quantizations=[null,int8]"])).quantizations == [None, "int8"]


def test_what_cannot_be_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"quantization='int3' is unknown: choose one of int8, int4, or null"):
        ModelConfig("tiny", "somewhere", quantization="int3")
    with pytest.raises(SystemExit, match="2"):
        generate.main(["run=nowhere", "quantization=int3", "text"])
    assert "quantization='int3' is unknown" in capsys.readouterr().err
    model = routed_model()
    model.add_lora()
    with pytest.raises(ValueError, match=r"merge_and_unload\(\) first"):
        quantize(model.lm, "int8")
    with pytest.raises(ValueError, match="have no nn.Linear"):
        quantize(tiny_model("gpt2"), "int8")


def test_stacked_experts_are_named() -> None:
    lm = tiny_model("mixtral")
    layers = lm.model.layers
    share = sum(p.numel() for p in layers.parameters() if p.ndim == 3) / sum(p.numel() for p in layers.parameters())
    with pytest.warns(UserWarning, match=rf"12 stacked weights of experts, {share:.0%} of the layers' numbers, stay"):
        quantize(lm, "int8")


@BOTH
def test_lora_on_quantized_layers_and_saving_them_are_refused(tmp_path: Path, name: str) -> None:
    model = quantized(name)
    assert is_quantized(model)
    with pytest.raises(ValueError, match="the model is quantized"):
        model.add_lora(LoraSettings())
    with pytest.raises(ValueError, match="save it before quantizing"):
        model.save_pretrained(tmp_path, save_base=True)


def test_training_is_refused_and_null_is_no_part_of_a_run(tmp_path: Path) -> None:
    given = overrides(tmp_path, tmp_path)
    config, method = composed(*given)
    assert config.identity()["model"]["quantization"] is None
    smaller, _ = composed(*given, "model.quantization=int8")
    assert smaller.identity()["model"]["quantization"] == "int8" and smaller.hash() != config.hash()
    with pytest.raises(ValueError, match="model.quantization='int8' is for decoding, and this trains"):
        Experiment(smaller, method)


@pytest.mark.gpu
@BOTH
def test_gpu_weights_change_little(name: str) -> None:
    """And steps through our kernels and replays are those of plain torch."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    plain = lm.to("cuda", torch.bfloat16)
    small = deepcopy(plain)
    quantize(small, name)
    ids = torch.tensor([[5, 6, 7, 8]], device="cuda")
    with torch.no_grad():
        before, after = plain(ids).logits.float(), small(ids).logits.float()
    assert is_quantized(small) and 0 < (after - before).norm() < (0.1 if name == "int8" else 0.6) * before.norm()
    eager, kernels = LlamaStep(small, 2, 64), GraphStep(small, 2, 64, Graphs(torch.device("cuda")))
    kv = torch.randn(2, 2, 9, 32, device="cuda", dtype=torch.bfloat16)
    for step in (eager, kernels):
        step.join(dict.fromkeys(range(4), kv), 9)
    for token in range(3):
        tokens = torch.tensor([10 + token], device="cuda")
        wanted, found = (step(tokens).float() for step in (eager, kernels))
        assert (found - wanted).norm() < 0.05 * wanted.norm()
    model = RouterAugmentedLM(small)
    assert len(DecodeEngine(model, 16).generate([[5, 6, 7]], 4, eos=()).tokens[0]) == 4


@pytest.mark.gpu
def test_gpu_four_bits_are_for_bfloat16() -> None:
    with pytest.raises(ValueError, match="quantization='int4' on cuda is for bfloat16, not torch.float32"):
        quantize(routed_model().to("cuda").lm, "int4")
