"""The benchmark: bytes and limits by hand, a run from end to end, errors."""

import json
import subprocess
import sys
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from firstlab.bench.cell import Variant
from firstlab.bench.config import BenchmarkConfig, load
from firstlab.bench.decoding import Queue, measure
from firstlab.bench.models import Models, check_memory
from firstlab.bench.report import print_decoding, run
from firstlab.bench.workload import chosen_routes, copy_bandwidth, distinct_routes, read_bytes, spread_route
from firstlab.config.build import ARCHITECTURES
from firstlab.config.compose import conf_dir
from firstlab.config.schema import SpeedModelConfig
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.sampling import Sampling
from firstlab.model.settings import RouterSettings
from support.models import tiny_model
from support.tiny_run import save_tiny_model


@given(st.integers(3, 80), st.floats(0, 0.6))
def test_spread_route(layers: int, rate: float) -> None:
    skipped = round(rate * layers)
    if skipped > layers - 2:
        with pytest.raises(ValueError, match="the first and the last are kept"):
            spread_route(layers, rate)
        return
    route = spread_route(layers, rate)
    assert route[0] and route[-1] and int((~route).sum()) == skipped
    gaps = (~route).nonzero().flatten().diff()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_spread_route_of_sixteen_layers() -> None:
    assert (~spread_route(16, 0.25)).nonzero().flatten().tolist() == [2, 6, 9, 13]


@given(st.integers(4, 40), st.floats(0.1, 0.6), st.integers(1, 12), st.integers(0, 3))
def test_distinct_routes(layers: int, rate: float, count: int, seed: int) -> None:
    skipped = round(rate * layers)
    if skipped > layers - 2 or count > comb(layers - 2, skipped):
        with pytest.raises(ValueError, match=r"skip_rates: |mixed_routes: "):
            distinct_routes(layers, rate, count, seed)
        return
    routes = distinct_routes(layers, rate, count, seed)
    assert len(set(map(tuple, routes.tolist()))) == count
    assert routes[:, [0, -1]].all() and ((~routes).sum(1) == skipped).all()
    assert torch.equal(routes, distinct_routes(layers, rate, count, seed))


def test_the_engine_orders_no_weights_but_its_own(folder: Path) -> None:
    models = Models.load(str(folder), RouterSettings(), random_init=False, device=torch.device("cpu"))
    DecodeEngine(models.for_engine, 16)
    assert not models.for_engine.lm.model.layers[0].mlp.down_proj.weight.is_contiguous()
    for lm in (models.plain, models.routed.lm):
        assert all(weight.is_contiguous() for weight in lm.parameters())


def test_mixed_routes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"decoders": ["engine"], "batch_sizes": [1], "skip_rates": [0.0, 0.33]}
    record = measure(settings(folder, mixed_routes=[2, 3], mixed_batch_size=6, **options))
    print_decoding(record)
    rows = record["mixed_routes"]
    assert [(row["routes"], row["batch_size"], row["skip_rate_asked"]) for row in rows] == [(2, 6, 0.33), (3, 6, 0.33)]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["skip_rate"] == pytest.approx(2 / 6)
        assert row["throughput_ratio"] == pytest.approx(np.median(row["throughput_ratio_of_repetitions"]))
        assert len(row["throughput_ratio_of_repetitions"]) == 2 and row["tokens_per_s"] > 0
        assert 0.5 < row["limit_ratio"] < 1
        percent = f"{100 * row['throughput_ratio']:.0f}"
        assert f"mixed routes: {percent} % of the throughput of one shared route ({row['routes']} routes" in printed


def test_a_queue(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"decoders": ["engine"], "batch_sizes": [1], "skip_rates": [0.33], "prompt_lengths": [6, 9]}
    record = measure(settings(folder, queue=7, queue_batch_size=3, **options))
    print_decoding(record)
    rows = record["queues"]
    found = [(row["prompts"], row["batch_size"], row["prompt_length"], row["skip_rate_asked"]) for row in rows]
    assert found == [(7, 3, length, rate) for length in (6, 9) for rate in (0.0, 0.33)]
    printed = capsys.readouterr().out
    for row in rows:
        assert len(row["speedup_of_repetitions"]) == 2
        assert row["speedup_over_generate"] == pytest.approx(np.median(row["speedup_of_repetitions"]))
        text = f"queue of 7 prompts of up to {row['prompt_length']} tokens, batch 3, {100 * row['skip_rate']:.1f} %"
        assert f"{text} skipped: {row['tokens_per_s']:.0f} tokens/s" in printed


def test_ways_to_the_dense_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{word} sees a dog\n" for word in "abcdefghijklmnopqrs"))
    options = {"batch_sizes": [1], "skip_rates": [0.25, 0.5], "lossless": 3, "lossless_prompts": str(prompts)}
    folder = save_tiny_model(tmp_path / "model")
    record = measure(settings(folder, **options))
    print_decoding(record)
    rows = {(row["decoder"], row["skip_rate_asked"]): row for row in record["lossless"]}
    assert set(rows) == {
        *((way, None) for way in ("transformers", "prompt_lookup", "generate", "engine")),
        *((way, rate) for way in ("early_exit", "lossless") for rate in (0.25, 0.5)),
    }
    printed = capsys.readouterr().out
    assert "tiny, dense greedy text, 3 prompts one by one" in printed
    for (way, rate), row in rows.items():
        assert row["same_text"] == 1 and 0 < row["tokens"] <= 15 and row["seconds_per_token"] > 0
        assert len(row["speedup_of_repetitions"]) == 2 and way in printed
        assert row["speedup_over_transformers"] == pytest.approx(np.median(row["speedup_of_repetitions"]))
        if way == "lossless":
            assert len(row["skipped_layers"]) == 4 * rate and 0 <= row["accepted"] <= row["drafted"]
            assert 0 <= row["warned"] <= 3 and f"{row['warned']} of 3" in printed
    for wrong, message in (({"lossless_prompts": "nowhere"}, "is no file"), ({"lossless": 9}, "holds 19 prompts")):
        with pytest.raises(ValueError, match=message):
            measure(settings(folder, **options | wrong))


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_by_hand(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    lm = LlamaForCausalLM(config)
    # Query and output, key and value, gate up down, two norms; head dimension 2.
    layer = 2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 12 + 2 * 8
    head_and_norm = 11 * 8 + 8
    kv_per_token = 2 * 2 * 2
    route = torch.tensor([True, False, True, True])
    assert read_bytes(lm, route, 5, 20) == 4 * (head_and_norm + 3 * (layer + 5 * 20 * kv_per_token))
    mixed = torch.tensor([[True, False, True, True], [True, True, False, True]])  # all weights, 3 + 3 layers' KV
    assert read_bytes(lm, mixed, 2, 20) == 4 * (head_and_norm + 4 * layer + 6 * 20 * kv_per_token)
    assert read_bytes(lm.half(), route, 5, 20) == 2 * (head_and_norm + 3 * (layer + 5 * 20 * kv_per_token))


def test_copy_bandwidth() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu"), 1 << 22) < 1e13


@pytest.mark.gpu
def test_copy_bandwidth_of_a_gpu_does_not_count_starting_it() -> None:
    small, large = (copy_bandwidth(torch.device("cuda"), size << 20) for size in (512, 2048))
    assert 0.95 < small / large < 1.1 and 1e11 < small < 2e13


@pytest.mark.gpu
def test_gpu_benchmark(folder: Path) -> None:
    decoders = ["transformers", "generate", "engine", "engine_eager"]
    record = measure(settings(folder, device="cuda", decoders=decoders, mixed_routes=[2], mixed_batch_size=4))
    for cell in record["cells"]:
        for row in cell["variants"]:
            assert 0 < row["tpot_s"] <= row["tpot_p95_s"] < 1 and row["ttft_s"] > 0
            assert 0 < row["peak_memory_bytes"] < 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    return path


def settings(folder: Path, **given: object) -> BenchmarkConfig:
    small = {
        "device": "cpu",
        "batch_sizes": [1, 3],
        "prompt_lengths": [6],
        "tokens": 5,
        "repetitions": 2,
        "copy_mib": 1,
    }
    model = SpeedModelConfig("tiny", str(folder), random_init=bool(given.pop("random_init", False)))
    return BenchmarkConfig(model=model, **{**small, **given})  # type: ignore[arg-type]


def test_from_end_to_end(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model=hf", "model.name=tiny", f"model.path={folder}", "model.dtype=float32", "device=cpu", "tokens=5"]
    overrides += ["batch_sizes=[1,3]", "prompt_lengths=[6]", "repetitions=2", "copy_mib=1", "skip_rates=[0.33]"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        run(load(compose("benchmark", [*overrides, f"out={tmp_path}"])))
    assert "tiny, batch 3, prompt of 6 tokens" in capsys.readouterr().out
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["layers"] == 6 and record["packages"]["torch"] and record["settings"]["tokens"] == 5
    lm = tiny_model("llama")
    for cell, batch_size in zip(record["cells"], (1, 3), strict=True):
        rows = {(row["decoder"], row["skip_rate_asked"]): row for row in cell["variants"]}
        assert set(rows) == {
            ("transformers", 0),
            *((way, rate) for way in ("generate", "engine") for rate in (0, 0.33)),
        }
        assert cell["router_share_of_prefill"] == cell["router_s"] / cell["prefill_s"] > 0
        per_layer = batch_size * (6 + 5 - 1) * 2 * 2 * 8 * 4  # rows, tokens, K and V, heads, head dimension, fp32
        length = (7 + 8 + 9 + 10) / 4
        for (_, rate), row in rows.items():
            skipped = [2, 4] if rate else []
            assert row["skipped_layers"] == skipped
            assert row["kv_bytes"] == (6 - len(skipped)) * per_layer
            assert row["kv_bytes_saved"] == len(skipped) * per_layer
            route = torch.tensor([layer not in skipped for layer in range(6)])
            needed = read_bytes(lm, route, batch_size, length)
            assert row["bytes_per_step"] == needed
            assert row["limit_ratio"] == needed / read_bytes(lm, torch.ones(6, dtype=torch.bool), batch_size, length)
            assert row["limit_tpot_s"] == needed / record["copy_bandwidth_bytes_per_s"]
            assert 0 < row["tpot_s"] <= row["tpot_p95_s"] and row["ttft_s"] > 0 and row["peak_memory_bytes"] > 0
            assert row["tokens_per_s"] == pytest.approx(batch_size / row["tpot_mean_s"])
            assert 0 < row["cpu_share"] < 1.05
            assert len(row["tpot_mean_s_of_repetitions"]) == 2
            assert rate or row["tpot_ratio"] == 1


def test_every_engine_and_a_static_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "firstlab.bench.cell.compile_everywhere", lambda: None
    )  # not compiled: seconds instead of minutes
    caches, reset = set(), StaticCache.reset
    monkeypatch.setattr(StaticCache, "reset", lambda cache: (caches.add(id(cache)), reset(cache)))
    decoders = ["transformers", "transformers_static", "engine", "engine_eager"]
    record = measure(settings(folder, decoders=decoders, batch_sizes=[3], skip_rates=[0.33]))
    rows = {(row["decoder"], row["skip_rate_asked"]): row for row in record["cells"][0]["variants"]}
    assert set(rows) == {("transformers", 0), ("transformers_static", 0)} | {
        (decoder, rate) for decoder in ("engine", "engine_eager") for rate in (0, 0.33)
    }
    assert len({row["kv_bytes"] for (_, rate), row in rows.items() if rate == 0}) == 1
    assert len(caches) == 1  # the same in every repetition


def test_drawn_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[object]] = {"generate": set(), "engine": set()}
    generate, decode = GenerationMixin.generate, DecodeEngine.generate

    def spy_on_generate(lm, *given, **options):
        seen["generate"].add((options["do_sample"], options["temperature"], options["top_k"]))
        return generate(lm, *given, **options)

    def spy_on_engine(engine, *given, sampling, **options):
        seen["engine"].add(sampling)
        return decode(engine, *given, sampling=sampling, **options)

    monkeypatch.setattr(GenerationMixin, "generate", spy_on_generate)
    monkeypatch.setattr(DecodeEngine, "generate", spy_on_engine)
    options = {"batch_sizes": [2], "skip_rates": [0.33], "queue": 3, "mixed_routes": [2], "mixed_batch_size": 4}
    record = measure(settings(folder, do_sample=True, temperature=0.5, top_k=7, **options))
    assert seen == {"generate": {(True, 0.5, 7)}, "engine": {Sampling(0.5, 7)}}
    assert record["settings"]["do_sample"] and {len(record[each]) for each in ("mixed_routes", "queues")} == {1, 2}


def test_architecture_alone(tmp_path: Path) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    record = measure(settings(tmp_path, random_init=True, decoders=["engine"], skip_rates=[], batch_sizes=[1]))
    [row] = record["cells"][0]["variants"]
    assert row["decoder"] == "engine" and row["speedup_over_transformers"] is None


@pytest.mark.parametrize(("saved", "expected"), [(torch.bfloat16, torch.bfloat16), (None, torch.float32)])
def test_architecture_alone_in_its_own_dtype(tmp_path: Path, saved: torch.dtype | None, expected: torch.dtype) -> None:
    config = tiny_model("llama").config
    config.dtype = saved
    config.save_pretrained(tmp_path)
    models = Models.load(
        str(tmp_path), RouterSettings(), random_init=True, device=torch.device("cpu"), dtype="auto", revision="main"
    )
    assert {weight.dtype for weight in models.plain.parameters()} == {expected}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_implementation": "somebody/kernel"}, "attention code of the hub, somebody/kernel"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "planted.Thing"}}, "needs code from the hub"),
        ({"quantization_config": "x"}, "cannot be read"),
    ],
)
def test_an_architecture_runs_no_code_of_its_folder(tmp_path: Path, change: dict[str, object], message: str) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Models.load(str(tmp_path), RouterSettings(), random_init=True, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "parameters"), [("meta-llama/Meta-Llama-3-8B", 8_030_261_248), ("meta-llama/Llama-3.2-3B", 3_212_749_824)]
)
def test_bundled_architectures_have_the_published_size(name: str, parameters: int) -> None:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ARCHITECTURES[name]))
    assert sum(each.numel() for each in lm.parameters()) == parameters


def test_every_model_of_the_paper_is_bundled() -> None:
    for name in ("llama3_8b", "llama32_3b"):
        with initialize_config_dir(conf_dir(), version_base="1.3"):
            config = load(compose("benchmark", [f"model={name}", "model.random_init=true"]))
        assert config.model.random_init and ARCHITECTURES[config.model.path].name == name


def test_routes_of_the_paper(folder: Path) -> None:
    routes = chosen_routes(settings(folder, routes="paper"), 32)
    # Table 15, Router + LoRA: layers that more than half of the sequences skip.
    assert {rate: (~route).nonzero().flatten().tolist() for rate, route in routes.items()} == {
        0.0: [],
        0.125: [7, 8, 9, 21],
        0.25: [7, 8, 12, 15, 18, 19, 20, 21],
        0.375: [7, 8, 10, 12, 15, 16, 18, 19, 20, 21, 23, 26],
    }


def test_weights_larger_than_the_memory_are_refused() -> None:
    config = LlamaConfig(vocab_size=128256, hidden_size=65536, intermediate_size=262144, num_hidden_layers=128)
    with pytest.raises(ValueError, match=r"weights take [\d.]+ GiB in torch.float32, cpu has .* model.dtype=bfloat16"):
        check_memory(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip_rates": [1.0]}, r"skip_rates=\[1.0\]"),
        ({"batch_sizes": []}, r"batch_sizes=\[\]"),
        ({"prompt_lengths": [0]}, r"prompt_lengths=\[0\]"),
        ({"least_cpu_share": 2.0}, "least_cpu_share=2.0"),
        ({"tokens": 1}, "tokens=1"),
        ({"temperature": 0.0}, "temperature=0.0.*do_sample=false"),
        ({"top_k": -1}, "top_k=-1"),
        ({"mixed_routes": [1]}, r"mixed_routes=\[1\].*mixed_batch_size=32"),
        ({"mixed_routes": [8], "mixed_batch_size": 4}, r"mixed_routes=\[8\].*mixed_batch_size=4"),
        ({"mixed_routes": [8], "decoders": ["generate"]}, r"mixed_routes=\[8\].*decoders=\['generate'\]"),
        ({"mixed_batch_size": 1}, "mixed_batch_size=1"),
        ({"queue": -1}, "queue=-1"),
        ({"queue_batch_size": 0}, "queue_batch_size=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"repetitions": 0}, "repetitions=0"),
        ({"routes": "random"}, "routes='random'.*spread, paper"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"decoders": ["vllm"]}, r"decoders=\['vllm'\].*transformers, transformers_static, generate, engine, engine_e"),
    ],
)
def test_settings_out_of_range(folder: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(folder, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip_rates": [0.9]}, "skip_rates: 0.9 skips 5 of 6 layers"),
        ({"routes": "paper"}, "Table 15 is about a model of 32 layers, and model=tiny has 6"),
        ({"mixed_routes": [2], "skip_rates": [0.05]}, r"mixed_routes: skip_rates=\[0.05\] skip none of 6 layers"),
        ({"mixed_routes": [9], "skip_rates": [0.2]}, "mixed_routes: 9 different routes at skip rate 0.2, but only 4"),
        ({"prompt_lengths": [125]}, "needs 130 positions, and model=tiny has 128"),
        ({"model": SpeedModelConfig("none", "no/such/folder", random_init=True)}, "is not available: no such folder"),
    ],
)
def test_settings_that_do_not_fit_the_model(folder: Path, given: dict[str, object], message: str) -> None:
    config = settings(folder)
    for option, value in given.items():
        setattr(config, option, value)
    with pytest.raises(ValueError, match=message):
        measure(config)


def test_model_that_the_engine_does_not_know(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"decoders: GPT2LMHeadModel.*decoders=\[transformers,generate\]"):
        measure(settings(tmp_path))
    with pytest.raises(ValueError, match="queue: GPT2LMHeadModel.*so set queue=0"):
        measure(settings(tmp_path, decoders=["transformers", "generate"], queue=3))
    record = measure(settings(tmp_path, decoders=["transformers", "generate"]))
    assert {row["decoder"] for row in record["cells"][0]["variants"]} == {"transformers", "generate"}


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, firstlab.benchmark; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_ratio_when_other_processes_take_turns() -> None:
    # Steps of 3 and 2 ms; a turn of 4 ms comes every 4 ms of work. It meets most of the long and half of the short.
    def steps(work: float) -> np.ndarray:
        ends = np.arange(0, 240 + work, work)
        return np.diff(ends + 4 * np.floor(ends / 4))

    dense, routed = (
        Variant("engine", 0.0, torch.ones(6, dtype=torch.bool), steps_s=[steps(work)]) for work in (3.0, 2.0)
    )
    assert routed.tpot_s[0] / dense.tpot_s[0] == pytest.approx(2 / 3, rel=0.02)
    assert abs(np.median(routed.steps_s[0]) / np.median(dense.steps_s[0]) - 2 / 3) > 0.05


def test_both_ways_of_a_queue_decode_every_prompt_to_its_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models.load(str(folder), RouterSettings(), random_init=False, device=torch.device("cpu"))
    config = BenchmarkConfig(queue=11, queue_batch_size=4, tokens=8, skip_rates=[0.33], seed=3)
    queue = Queue(config, models, quantization=None, prompt_length=20)
    assert min(map(len, queue.prompts)) >= 5 and max(map(len, queue.prompts)) <= 20
    assert min(queue.limits) >= 2 and max(queue.limits) <= 8
    assert len(set(map(len, queue.prompts))) > 3 and len(set(queue.limits)) > 3
    slow, fast = [], []
    generate, decode = models.routed.generate, queue.engine.generate

    def generate_and_keep(ids, mask, **options):
        out = generate(ids, mask, **options)
        slow.extend(out[:, ids.shape[1] :].tolist())
        return out

    def decode_and_keep(*arguments, **options):
        out = decode(*arguments, **options)
        fast.append(out.tokens)
        return out

    monkeypatch.setattr(models.routed, "generate", generate_and_keep)
    monkeypatch.setattr(queue.engine, "generate", decode_and_keep)
    records = queue.measure(warmup=0, repetitions=1)
    dense, skipping = records
    assert dense["skip_rate"] == 0 and skipping["skip_rate"] == pytest.approx(2 / 6)
    for record in records:
        assert record["new_tokens"] == sum(queue.limits) and record["prompt_tokens"] == sum(map(len, queue.prompts))
        assert record["speedup_over_generate"] > 0
    # The same tokens; generate goes on to the longest of its batch, which does not count.
    assert len(fast) == 2 and len(slow) == 2 * 11
    for place, tokens in enumerate(sum(fast, [])):
        assert len(tokens) == queue.limits[place % 11] and tokens == slow[place][: len(tokens)]
