"""The parts that `firstlab.bench.gpu` runs: each measures, prints its tables and says what was wanted."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from firstlab.bench import decoding, training
from firstlab.bench.config import BenchmarkConfig, TrainingSpeedConfig
from firstlab.bench.models import Models, load_models
from firstlab.bench.report import print_decoding, print_table, print_training, tpot_against_skip
from firstlab.bench.workload import copy_bandwidth, read_bytes
from firstlab.config.build import ARCHITECTURES, BUNDLED
from firstlab.config.schema import SpeedModelConfig
from firstlab.data.encoding import prompt_ids, response_ids
from firstlab.data.mini_translation import MiniTranslation
from firstlab.engine.engine import DecodeEngine
from firstlab.engine.graphs import Graphs
from firstlab.evaluation.timing import synchronize
from firstlab.model.layers import find_decoder
from firstlab.model.quantization import QUANTIZATIONS, quantize
from firstlab.model.storage import load_base, load_tokenizer
from firstlab.store import paper

ROOT = Path(__file__).resolve().parents[3]
BUNDLED_MODEL = str(BUNDLED["bundled:nano"])


@dataclass(frozen=True)
class Target:
    """A number that was measured, and what it should be."""

    what: str
    value: float
    wanted: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        """NaN never is."""
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted


@dataclass
class Found:
    """What a part measured."""

    record: dict[str, Any]
    targets: list[Target] = field(default_factory=list)


class MissingError(Exception):
    """A part cannot run here: a library or folder is not there."""


def environment() -> dict[str, str]:
    """Of further processes: they find the package where it is, installed or not, and ask no network."""
    places = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), "HF_HUB_OFFLINE": "1"}


#: Enough for routes and losses to move, in a minute or two.
_RUN = "trainer=gpu router_phase.max_steps=30 lora_phase.max_steps=60 evaluation.limit=100"
_MINI_RUN = """
trainer=cpu phases=[router,lora,evaluate] compare_with_base=false method.target_skip=0.15
data.train_size=32 data.val_size=8 data.max_new_tokens=4 method.calibration_prompts=2
router_phase.max_steps=1 router_phase.batch_size=2 router_phase.validate_every=1
lora_phase.max_steps=1 lora_phase.batch_size=2 lora_phase.validate_every=1
evaluation.limit=4 evaluation.resamples=100
evaluation.tpot_prompts=1 evaluation.tpot_tokens=3 evaluation.tpot_repetitions=1
"""


@dataclass(frozen=True)
class Sizes:
    """What a preset measures, on which device; as defaults that of preset=gpu."""

    device: str
    large: SpeedModelConfig
    small: SpeedModelConfig
    prompt: int = 512  # tokens
    long_prompt: int = 8000
    tokens: int = 64  # new ones
    batches: tuple[int, int] = (8, 32)  # more rows than one, short prompts
    long_batch: int = 8
    mixed: tuple[int, int] = (32, 8)  # rows, and their different routes
    waiting: int = 64  # prompts of a queue
    prefills: tuple[tuple[int, int], ...] = ((1, 128), (1, 512), (1, 2048), (1, 8000), (32, 128))  # rows × tokens
    training: tuple[int, int, int] = (8, 128, 64)  # rows, tokens of prompts, tokens of responses
    run: str = _RUN  # options of firstlab.train
    repetitions: int = 5
    matrix: int = 8192  # side of the product that measures the arithmetic
    copy_mib: int = 1024
    decoders: tuple[str, ...] = ("transformers_static",)  # beside the engine, at batch 1
    examples: int = 100  # that measure the quality of quantized weights

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


def sizes_of(preset: str, device: str, out: Path) -> Sizes:
    """Those of a preset; `out` takes the config of a tiny model."""
    if preset == "gpu":
        large, small = (
            SpeedModelConfig(name, path, dtype="bfloat16", random_init=True)
            for name, path in zip(("llama3_8b", "llama32_3b"), ARCHITECTURES, strict=True)
        )
        return Sizes(device, large, small)
    folder = out / "tiny-model"
    shape: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    LlamaConfig(**shape).save_pretrained(folder)
    tiny = SpeedModelConfig("tiny", str(folder), dtype="float32", random_init=True)
    numbers: dict[str, Any] = {"prompt": 12, "long_prompt": 80, "tokens": 4, "batches": (2, 4), "long_batch": 2}
    numbers |= {"mixed": (4, 2), "waiting": 4, "prefills": ((1, 12), (2, 30)), "training": (2, 6, 4), "run": _MINI_RUN}
    numbers |= {"repetitions": 2, "matrix": 128, "copy_mib": 1, "decoders": ("transformers",), "examples": 3}
    return Sizes(device, tiny, tiny, **numbers)


def tests(sizes: Sizes, out: Path) -> Found:
    """The tests marked gpu; those that take longest are listed."""
    folder = ROOT / "tests"
    if find_spec("pytest") is None or not folder.is_dir():
        raise MissingError("the tests need pytest and the repository: pip install -e '.[dev]' in a checkout")
    marked = [str(each) for each in sorted(folder.rglob("test_*.py")) if "mark.gpu" in each.read_text(encoding="utf-8")]
    report = out / "tests.xml"
    report.unlink(missing_ok=True)
    # Without the options of pyproject.toml, which may be those of plugins that are not there.
    options = ["-q", "-m", "gpu", "-o", "addopts=", "--import-mode=importlib", f"--junitxml={report}"]
    command = [sys.executable, "-m", "pytest", *options, *marked]
    code = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
    if not report.exists():
        raise ValueError(f"the tests did not run: pytest ended with {code}")
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [each for each in cases if each.find("failure") is not None or each.find("error") is not None]
    skipped = [each for each in cases if each.find("skipped") is not None]
    seconds = {str(each.get("name")): float(each.get("time") or 0) for each in cases}
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:5]
    shown = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    print_table("tests marked gpu", [{name: str(value) for name, value in shown.items()}])
    print("slowest: " + ", ".join(f"{name} {seconds[name]:.1f} s" for name in slowest))
    record = {**shown, "failures": [str(each.get("name")) for each in failed], "seconds": seconds}
    slow = Target("seconds of the slowest test marked gpu", max(seconds.values(), default=0.0), 10)
    return Found(record, [Target("failed tests marked gpu", len(failed), 0), slow])


def _measure_decoding(sizes: Sizes, model: SpeedModelConfig, out: Path, **given: Any) -> dict[str, Any]:
    """Measured and printed."""
    _let_go(sizes)
    options = {"decoders": ["engine"], "skip_rates": [0.25], "prompt_lengths": [sizes.prompt], "batch_sizes": [1]}
    options |= {"repetitions": sizes.repetitions, "copy_mib": sizes.copy_mib, "tokens": sizes.tokens, "out": str(out)}
    options |= given | {"least_cpu_share": 0.0}  # a host that waits for the device is no sign of others at work
    record = decoding.measure(BenchmarkConfig(model=model, device=sizes.device, **options))  # type: ignore[arg-type]
    print_decoding(record)
    return record


def _rows(record: dict[str, Any], decoder: str = "engine") -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each variant of a decoder with its name and cell."""
    for cell in record["cells"]:
        for row in cell["variants"]:
            if row["decoder"] == decoder:
                at = f"batch {cell['batch_size']}, prompt of {cell['prompt_length']}"
                weights = f", {row['quantization']}" if row["quantization"] else ""
                yield f"{record['model']}, {at}, {100 * row['skip_rate']:.1f} % skipped{weights}", cell, row


def decode(sizes: Sizes, out: Path) -> Found:
    """Time per token of the engine at several skip rates, batches and lengths, beside transformers' compiled cache."""
    every, targets, records = [0.15, 0.25, 0.35], [], []
    for model, factor in ((sizes.large, 1.15), (sizes.small, 1.25)):
        record = _measure_decoding(sizes, model, out, skip_rates=every, decoders=[*sizes.decoders, "engine"])
        records.append(record)
        targets += _targets_of_one_row(record, factor, sizes.decoders[0])
        picture = out / f"decode-{model.name}.png"
        tpot_against_skip(record, paper.read()["tpot"]["5"]["tasks"]["wmt_ende"], picture)
        print(f"picture: {picture}")
    records.append(_measure_decoding(sizes, sizes.large, out, batch_sizes=list(sizes.batches)))
    for name, cell, row in _rows(records[-1]):
        if cell["batch_size"] == max(sizes.batches):
            targets.append(Target(f"TPOT ÷ the bytes' limit, {name}", row["tpot_s"] / row["limit_tpot_s"], 1.3))
    long = {"prompt_lengths": [sizes.long_prompt], "batch_sizes": [1, sizes.long_batch], "repetitions": 2}
    records.append(_measure_decoding(sizes, sizes.large, out, **long))
    share = _host_share(sizes)
    print(f"the host takes {100 * share:.0f} % of a step's time to start it")
    targets.append(Target("host's share of a decode step's time", share, 0.25))
    return Found({"measurements": records, "host_share": share, "kernels": _kernels(sizes)}, targets)


def _kernels(sizes: Sizes) -> list[dict[str, Any]]:
    """Ours beside those of FlashInfer, printed, where that is installed."""
    if sizes.device == "cpu" or find_spec("flashinfer") is None or find_spec("triton") is None:
        print("our kernels are compared with FlashInfer's on a GPU, if that and Triton are installed: left out")
        return []
    from firstlab.bench.libraries import beside_flashinfer

    models = _loaded(sizes, sizes.large, sizes.prompt)

    def clock(way: Callable[[], object]) -> float:
        def often() -> None:
            for _ in range(100):
                way()

        return 1e4 * _shortest(Graphs(sizes.torch_device)("kernel", often), sizes.torch_device, 10)

    rows = beside_flashinfer(models.plain.config, sizes.prompt, models.plain.dtype, sizes.torch_device, clock)
    shown: list[dict[str, str | None]] = [{name: f"{value}"[:8] for name, value in row.items()} for row in rows]
    print_table("kernels of one layer", shown)
    return rows


def _targets_of_one_row(record: dict[str, Any], factor: float, compiled: str) -> list[Target]:
    found = []
    for name, _, row in _rows(record):
        found.append(Target(f"TPOT ÷ the bytes' limit, {name}", row["tpot_s"] / row["limit_tpot_s"], factor))
        off = abs(row["tpot_ratio_of_medians"] / row["limit_ratio"] - 1)
        found.append(Target(f"TPOT ratio's distance from the limit's, {name}", off, 0.01))
    dense = next(row for _, _, row in _rows(record) if row["skip_rate"] == 0)
    [other] = [row for _, _, row in _rows(record, compiled)]
    what = f"times as fast as {compiled}, {record['model']}"
    return [*found, Target(what, other["tpot_s"] / dense["tpot_s"], 1.7, at_most=False)]


def _let_go(sizes: Sizes) -> None:
    """Give back what an earlier measurement held: compiled functions and trainers hold models in circles."""
    torch.compiler.reset()
    gc.collect()
    if sizes.device == "cuda":
        torch.cuda.empty_cache()


def _loaded(sizes: Sizes, model: SpeedModelConfig, longest: int) -> Models:
    _let_go(sizes)
    config = BenchmarkConfig(model=model, device=sizes.device)
    return load_models(config, longest, f"prompts and new tokens of {longest}")


@torch.no_grad()
def _host_share(sizes: Sizes, steps: int = 20) -> float:
    """The host's time to start decode steps of one row ÷ the time until they are done."""
    models = _loaded(sizes, sizes.large, sizes.prompt + 3 * steps)
    step, device = DecodeEngine(models.for_engine, sizes.prompt + 3 * steps).step, sizes.torch_device
    kv = torch.zeros(2, step.kv_heads, sizes.prompt, step.head_dim, dtype=step.embedding.dtype, device=device)
    step.join(dict.fromkeys(range(len(step.layers)), kv), sizes.prompt)
    tokens = torch.zeros(1, dtype=torch.long, device=device)
    for _ in range(steps):  # captured here
        step(tokens)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        step(tokens)
    host = time.perf_counter() - start
    synchronize(device)
    return host / (time.perf_counter() - start)


def mixed(sizes: Sizes, out: Path) -> Found:
    """Rows of different routes in one batch, and a queue of prompts and responses of different lengths."""
    rows, routes = sizes.mixed
    given = {"mixed_routes": [routes], "mixed_batch_size": rows, "queue": sizes.waiting, "queue_batch_size": rows}
    given |= {"prompt_lengths": [max(sizes.prompt // 4, 2)], "repetitions": 3}
    record = _measure_decoding(sizes, sizes.large, out, **given)
    targets = []
    for row in record["mixed_routes"]:
        what = f"throughput of {row['routes']} routes in {row['batch_size']} rows ÷ what the bytes allow"
        targets.append(Target(what, row["throughput_ratio"] / row["limit_ratio"], 0.95, at_most=False))
    return Found(record, targets)


def prefill(sizes: Sizes, out: Path) -> Found:
    """Time to the first token beside what arithmetic and memory allow, and what the routers add to it."""
    device = sizes.torch_device
    longest, most = max(length for _, length in sizes.prefills) + 1, max(rows for rows, _ in sizes.prefills)
    models = _loaded(sizes, sizes.large, longest)
    engine = DecodeEngine(models.for_engine, longest, most)
    dense = torch.ones(models.routed.num_layers, dtype=torch.bool)
    rate, bandwidth = _arithmetic(sizes, models.plain.dtype), copy_bandwidth(device, sizes.copy_mib << 20)
    found: list[dict[str, Any]] = []
    targets = []
    for rows, length in sizes.prefills:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, models.vocabulary, (rows, length), generator=generator)
        prompts, there = ids.tolist(), ids.to(device)
        ways: dict[str, Callable[[], object]] = {
            "transformers": partial(models.plain, there, logits_to_keep=1),
            "engine, forced": partial(engine.generate, prompts, 1, dense, ()),
            "engine": partial(engine.generate, prompts, 1, None, ()),
        }
        seconds = {name: _shortest(way, device, sizes.repetitions) for name, way in ways.items()}
        needed = _operations(models, rows, length) / rate
        least = max(needed, read_bytes(models.plain, dense, 1, 0) / bandwidth)
        routers = (seconds["engine"] - seconds["engine, forced"]) / seconds["engine"]
        found.append({"rows": rows, "length": length, "seconds": seconds, "limit_s": least, "router_share": routers})
        at = f"{rows} × {length} tokens"
        targets.append(Target(f"TTFT ÷ arithmetic, {at}", seconds["engine"] / least, 1.5))
        targets.append(Target(f"routers' share of TTFT, {at}", routers, 0.003))
    table: list[dict[str, str | None]] = []
    for row in found:
        shown: dict[str, str | None] = {"rows × tokens": f"{row['rows']} × {row['length']}"}
        shown |= {f"{name}, ms": f"{1000 * value:.2f}" for name, value in row["seconds"].items()}
        shown |= {"arithmetic": f"{1000 * row['limit_s']:.2f}", "routers": f"{100 * row['router_share']:.2f} %"}
        table.append(shown)
    print_table(f"{sizes.large.name}: time to the first token (products run at {rate / 1e12:.3g} TFLOP/s)", table)
    return Found({"operations_per_s": rate, "copy_bandwidth_bytes_per_s": bandwidth, "prefills": found}, targets)


@torch.no_grad()
def _shortest(way: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Seconds of the fastest of several calls, after two that do not count."""
    times = []
    for _ in range(2 + max(repetitions, 3)):
        synchronize(device)
        start = time.perf_counter()
        way()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[2:])


def _arithmetic(sizes: Sizes, dtype: torch.dtype) -> float:
    """Operations per second of a large product."""
    one = torch.randn(sizes.matrix, sizes.matrix, device=sizes.device, dtype=dtype)
    return 2 * sizes.matrix**3 / _shortest(lambda: one @ one, sizes.torch_device, 10)


def _operations(models: Models, rows: int, length: int) -> float:
    """Of a prefill: products of all layers for every token, of the head for the last ones, and causal attention."""
    config: Any = models.plain.config
    layers = find_decoder(models.plain)[1]
    weights = sum(each.numel() for each in layers.parameters() if each.ndim == 2)
    head = config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
    attention = len(layers) * (heads or config.hidden_size) * length**2  # 2 products, 2 operations, half of the places
    return rows * (2 * weights * length + 2 * head + 2 * attention)


def train(sizes: Sizes, out: Path) -> Found:
    """Steps of both phases beside those of transformers' Trainer with PEFT."""
    batch, prompt, response = sizes.training
    given = {"batch_size": batch, "prompt_length": prompt, "response_length": response, "out": str(out)}
    given |= {"repetitions": min(sizes.repetitions, 3)}
    record = training.measure(TrainingSpeedConfig(model=sizes.large, device=sizes.device, **given))  # type: ignore[arg-type]
    print_training(record)
    rows = {row["variant"]: row for row in record["variants"]}
    targets = []
    for phase, wanted in (("phase_1", 2.0), ("phase_2", 1.2)):
        speed, peak = rows[phase]["speedup_over_plain"], rows[phase]["peak_memory_bytes"]
        targets.append(Target(f"{phase} ÷ a plain step's speed", speed, wanted, at_most=False))
        if peak is not None:
            targets.append(Target(f"{phase}: peak GB", peak / 1e9, 40))
    return Found(record, targets)


def run(sizes: Sizes, out: Path) -> Found:
    """A short training run of the bundled model with its evaluation, as a user would start it."""
    runs = out / "training-run"
    options = [*sizes.run.split(), f"runs={runs}", "overwrite=true", "trainer.progress_bar=false"]
    start = time.monotonic()
    command = [sys.executable, "-m", "firstlab.train", *options]
    code = subprocess.run(command, env=environment(), check=False).returncode
    if code:
        raise ValueError(f"firstlab.train {' '.join(options)} ended with {code}")
    seconds = time.monotonic() - start
    results = {str(each.parent.relative_to(runs)): json.loads(each.read_text()) for each in runs.rglob("result.json")}
    table = [
        {"run": f"{name}: {variant}"}
        | {key: f"{value['value']:.1f}" for key, value in found["metrics"].items() if "value" in value}
        | {"skipped": f"{100 * found['skip']['skip_rate']:.1f} %"}
        for name, result in results.items()
        for variant, found in result["variants"].items()
    ]
    print_table(f"training and evaluation, {seconds:.0f} s", table)
    return Found({"seconds": seconds, "results": results}, [Target("seconds of the training run", seconds, 180)])


def quantized(sizes: Sizes, out: Path) -> Found:
    """Speed and quality of smaller weights, with and without skipping."""
    weights = [None, *QUANTIZATIONS]
    record = _measure_decoding(sizes, sizes.large, out, quantizations=weights)
    quality = {str(name): _cross_entropy(sizes, name) for name in weights}
    shown: dict[str, str | None] = {re.sub("None", "plain", name): f"{loss:.4f}" for name, loss in quality.items()}
    print_table(f"bundled model, cross-entropy of {sizes.examples} responses by weights", [shown])
    targets = []
    for name, _, row in _rows(record):
        if row["quantization"]:
            targets.append(Target(f"TPOT ÷ the bytes' limit, {name}", row["tpot_s"] / row["limit_tpot_s"], 1.3))
    targets += [
        Target(f"cross-entropy that {name} adds", quality[name] - quality["None"], 0.01 if name == "int8" else 0.2)
        for name in QUANTIZATIONS
    ]
    return Found({"speed": record, "cross_entropy": quality}, targets)


@torch.no_grad()
def _cross_entropy(sizes: Sizes, name: str | None) -> float:
    """Mean loss per response token of the bundled model on its own task, every layer run."""
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    lm: Any = load_base(BUNDLED_MODEL, dtype=dtype)
    lm = lm.to(sizes.device).eval()
    quantize(lm, name)
    tokenizer, task = load_tokenizer(BUNDLED_MODEL), MiniTranslation(test_size=sizes.examples)
    losses = []
    for example in task.test():
        prompt = prompt_ids(tokenizer, task.prompt(example))
        response = response_ids(tokenizer, example.references[0])
        ids = torch.tensor([prompt + response], device=sizes.device)
        logits = lm(ids).logits[0, len(prompt) - 1 : -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
    return torch.cat(losses).mean().item()


MEASURES: dict[str, Callable[[Sizes, Path], Found]] = {
    "tests": tests,
    "decode": decode,
    "mixed": mixed,
    "prefill": prefill,
    "train": train,
    "run": run,
    "quantize": quantized,
}
