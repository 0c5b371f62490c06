"""All measurements in one command: every part in miniature, what is kept, what fails, what is missed."""

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from firstlab.bench import gpu, gpu_parts
from firstlab.bench.gpu import PARTS, GpuConfig, run
from firstlab.bench.gpu_parts import Found, MissingError, Target
from firstlab.bench.workload import distinct_routes
from firstlab.config.build import model_path
from firstlab.config.compose import compose_file, conf_dir, register
from firstlab.run.load import load
from support.models import tiny_model
from support.tiny_run import SMALL


def mini(out: Path, *parts: str, **given: Any) -> GpuConfig:
    return GpuConfig("mini", list(parts), "cpu", out=str(out), **given)


def measured(out: Path, part: str) -> dict[str, Any]:
    run(mini(out, part))
    record: dict[str, Any] = json.loads((out / f"{part}.json").read_text())
    assert (record["part"], record["preset"], record["left_out"]) == (part, "mini", None)
    assert record["packages"]["torch"] and record["seconds"] > 0
    return record


def whats(record: dict[str, Any]) -> str:
    return "\n".join(each["what"] for each in record["targets"])


def test_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = measured(tmp_path, "decode")
    cells = [
        (cell["batch_size"], cell["prompt_length"])
        for each in record["record"]["measurements"]
        for cell in each["cells"]
    ]
    assert cells == [(1, 12), (1, 12), (2, 12), (4, 12), (1, 80), (2, 80)]
    for part in ("tiny, batch 1, prompt of 12, 33.3 % skipped", "batch 4", "as fast as transformers", "host's share"):
        assert part in whats(record)
    assert (tmp_path / "decode-tiny.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "missed: TPOT ÷ the bytes' limit, tiny, batch 1" in printed and "the host takes" in printed


def test_mixed(tmp_path: Path) -> None:
    record = measured(tmp_path, "mixed")
    assert [row["routes"] for row in record["record"]["mixed_routes"]] == [2] and len(record["record"]["queues"]) == 2
    assert "throughput of 2 routes in 4 rows" in whats(record)


def test_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = measured(tmp_path, "prefill")
    rows = record["record"]["prefills"]
    assert [(row["rows"], row["length"]) for row in rows] == [(1, 12), (2, 30)]
    # Two heads of keys and values of 16 numbers; four of queries.
    weights = 6 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    operations = 2 * (2 * weights * 30 + 2 * 256 * 64 + 2 * 6 * 64 * 30**2)
    rate, bandwidth = (record["record"][name] for name in ("operations_per_s", "copy_bandwidth_bytes_per_s"))
    read = 4 * (weights + 6 * 2 * 64 + 64 + 256 * 64)
    assert rows[1]["limit_s"] == pytest.approx(max(operations / rate, read / bandwidth))
    assert "2 × 30" in capsys.readouterr().out and "routers' share of TTFT, 1 × 12 tokens" in whats(record)


def test_train(tmp_path: Path) -> None:
    record = measured(tmp_path, "train")
    assert {row["variant"] for row in record["record"]["variants"]} == {"plain", "phase_1", "phase_2"}
    assert [each["wanted"] for each in record["targets"]] == [2.0, 1.2]  # peak memory counts on a GPU


def test_quantize(tmp_path: Path) -> None:
    record = measured(tmp_path, "quantize")
    loss = record["record"]["cross_entropy"]
    assert 0 < abs(loss["int8"] - loss["None"]) < abs(loss["int4"] - loss["None"]) < 1
    names = {row["quantization"] for row in record["record"]["speed"]["cells"][0]["variants"]}
    assert names == {None, "int8", "int4"} and "int8, batch 1" not in whats(record)


def test_run(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = [each for each in SMALL if not each.startswith("method.")]
    options = [*small, f"model.path={tiny_model_dir}", "trainer=cpu", "phases=[evaluate]", "method=none"]
    sizes_of = gpu_parts.sizes_of
    monkeypatch.setattr(gpu_parts, "sizes_of", lambda *given: replace(sizes_of(*given), run=" ".join(options)))
    record = measured(tmp_path, "run")
    [(name, result)] = record["record"]["results"].items()
    assert name.startswith("mini_ende-tiny/none") and set(result["variants"]) == {"base"}


def test_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    with pytest.raises(MissingError, match=r"pip install -e '\.\[dev\]' in a checkout"):
        gpu_parts.tests(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    (tmp_path / "tests").mkdir()
    marked = "import pytest\n\npytestmark = pytest.mark.gpu\n"
    cases = "\n\ndef test_a(): pass\n\n\ndef test_b(): assert False\n\n\ndef test_c(): pytest.skip('no')\n"
    (tmp_path / "tests" / "test_marked.py").write_text(marked + cases)
    (tmp_path / "tests" / "test_other.py").write_text("raise ImportError\n")  # not marked, not even imported
    found = gpu_parts.tests(SimpleNamespace(), tmp_path)  # type: ignore[arg-type]
    assert {name: found.record[name] for name in ("passed", "failed", "skipped")} == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
    }
    assert found.record["failures"] == ["test_b"] and [each.met for each in found.targets] == [False, True]
    assert "slowest: " in capfd.readouterr().out


def test_kernels_beside_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def decode(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_layout: str) -> torch.Tensor:
        assert kv_layout == "HND"
        group = len(query) // len(keys)
        keys, values = (each.repeat_interleave(group, 0) for each in (keys, values))
        scores = torch.einsum("hd,hpd->hp", query, keys) * query.shape[-1] ** -0.5
        return torch.einsum("hp,hpd->hd", scores.softmax(-1), values)

    stand_in: Any = ModuleType("flashinfer")
    stand_in.rmsnorm = lambda x, norm, eps: torch.nn.functional.rms_norm(x, norm.shape, norm, eps)
    stand_in.silu_and_mul = lambda both: torch.nn.functional.silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1]
    stand_in.single_decode_with_kv_cache = decode
    monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
    from firstlab.bench.libraries import beside_flashinfer

    results: list[torch.Tensor] = []

    def clock(way: Any) -> float:
        results.append(way())
        return 1.0

    config = tiny_model("llama").config
    rows = beside_flashinfer(config, 20, torch.float32, torch.device("cpu"), clock)
    assert [row["operation"] for row in rows] == ["RMS norm", "SiLU times up", "attention"]
    for place, row in enumerate(rows):
        assert row["off"] < 1e-5
        for each in results[3 * place + 1 : 3 * place + 3]:
            torch.testing.assert_close(results[3 * place], each.view_as(results[3 * place]))


def test_targets() -> None:
    assert Target("a", 1.0, 1.0).met and not Target("a", 1.1, 1.0).met
    assert Target("a", 1.0, 1.0, at_most=False).met and not Target("a", 0.9, 1.0, at_most=False).met
    assert not Target("a", math.nan, 1.0).met and not Target("a", math.nan, 1.0, at_most=False).met


class Children:
    """Instead of further processes: notes what they are to do, and does it here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parts: list[str] = []
        self.outcome: dict[str, Any] = {}
        monkeypatch.setattr(gpu, "_exit_code", self)
        monkeypatch.setattr(gpu_parts, "MEASURES", {part: self.measure for part in PARTS})

    def measure(self, sizes: object, out: Path) -> Found:
        outcome = self.outcome.get(self.parts[-1])
        if isinstance(outcome, Exception):
            raise outcome
        return Found({"number": len(self.parts)}, [Target("time", 1.234567, 1.0), Target("speed", 2, 1, at_most=False)])

    def __call__(self, command: list[str], seconds: float) -> Any:
        assert command[:3] == [sys.executable, "-m", "firstlab.benchmark"] and 0 < seconds <= 20 * 60
        given = dict(each.split("=", 1) for each in command[3:])
        part = given["parts"].strip("[]")
        self.parts.append(part)
        outcome = self.outcome.get(part, 0)
        if outcome == 0 or isinstance(outcome, MissingError):
            overwrite = given["overwrite"] == "true"
            run(GpuConfig(given["preset"], [part], given["device"], overwrite=overwrite, out=given["out"]))
            outcome = 0
        return outcome


def test_what_was_measured_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = Children(monkeypatch)
    children.outcome = {"mixed": 1, "train": MissingError("no such library"), "run": None}
    with pytest.raises(SystemExit, match="1"):
        run(mini(tmp_path, *PARTS))
    assert children.parts == list(PARTS)
    printed = capsys.readouterr().out
    for text in (
        "mixed: failed with exit code 1",
        "train: left out, no such library",
        "run: ended, minutes=20 are over",
        "failed: mixed, run",
        "decode: 1 of 2 targets met\n  missed: time: 1.23, wanted at most 1\n",
    ):
        assert text in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) == {"tests", "decode", "prefill", "train", "quantize"}
    # What failed, was left out or came to no end is tried again; the rest stays.
    children.outcome, children.parts = {}, []
    run(mini(tmp_path, *PARTS))
    assert children.parts == ["mixed", "train", "run"]
    assert "decode: measured already; overwrite=true measures again" in capsys.readouterr().out
    run(mini(tmp_path, "decode", "mixed", overwrite=True))
    assert children.parts[3:] == ["decode", "mixed"]
    run(mini(tmp_path, "decode"))  # alone and there already
    assert len(children.parts) == 5


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, wait = tmp_path / "number", subprocess.Popen.wait

    def until_it_has_started(process: Any, timeout: float | None = None) -> int:
        if timeout != 1:
            return wait(process, timeout)
        while not file.exists() or not file.read_text():
            time.sleep(0.01)
        raise subprocess.TimeoutExpired("", timeout)

    def runs(number: str) -> bool:
        state = Path(f"/proc/{number}/stat")
        return state.exists() and ") Z " not in state.read_text()

    monkeypatch.setattr(subprocess.Popen, "wait", until_it_has_started)
    code = "import subprocess; p = subprocess.Popen(['sleep', '600']); "
    code += f"open({str(file)!r}, 'w').write(str(p.pid)); p.wait()"
    assert gpu._exit_code([sys.executable, "-c", code], 1) is None
    ends = time.monotonic() + 60  # a busy machine takes its time
    while runs(file.read_text()):
        assert time.monotonic() < ends
    code = "import os, firstlab; assert os.environ['HF_HUB_OFFLINE'] == '1'; raise SystemExit(3)"
    assert gpu._exit_code([sys.executable, "-c", code], 600) == 3


def test_no_time_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    children = Children(monkeypatch)
    with pytest.raises(SystemExit, match="1"):
        run(mini(tmp_path, "decode", "mixed", minutes=1e-9))
    assert children.parts == [] and "decode: not begun" in capsys.readouterr().out


def test_the_folder_of_another_preset_is_left_alone(tmp_path: Path) -> None:
    for text, why in (('{"part": "decode", "preset": "gpu"}', "it is no record of preset=mini"), ("{", "Expecting")):
        (tmp_path / "decode.json").write_text(text)
        with pytest.raises(ValueError, match=rf"decode\.json.*{why}.*choose another folder"):
            run(mini(tmp_path, "decode", "mixed"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "tpu"}, "preset='tpu' is not allowed: choose one of gpu, mini"),
        ({"device": "tpu"}, "device='tpu' is not allowed: choose one of auto, cpu, cuda"),
        ({"parts": ["decode", "speed"]}, r"parts=\['decode', 'speed'\] is not allowed: choose from tests, decode"),
        ({"parts": []}, r"parts=\[\] is not allowed"),
        ({"minutes": 0.0}, r"minutes=0\.0 is not allowed"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GpuConfig(out=str(tmp_path)), **given).check()


def test_the_preset_for_a_gpu_fits_its_models() -> None:
    register()
    sizes = gpu_parts.sizes_of("gpu", "cuda", Path())
    for model in (sizes.large, sizes.small):
        model.check_trainable()
        config = AutoConfig.from_pretrained(model_path(model.path, config_only=True))
        longest = max(sizes.long_prompt + sizes.tokens, *(length + 1 for _, length in sizes.prefills))
        assert longest <= config.max_position_embeddings and sizes.prompt + 60 <= config.max_position_embeddings
        assert len(distinct_routes(config.num_hidden_layers, 0.25, sizes.mixed[1], 0)) == 8
    assert load(compose_file("train", [*sizes.run.split(), "trainer=gpu"]))[0].trainer.accelerator == "gpu"


def test_the_preset_for_a_gpu_needs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpu, "_exit_code", None)  # nothing is begun
    for parts in (["decode"], list(PARTS)):
        with pytest.raises(ValueError, match="preset=gpu: torch finds no CUDA device; preset=mini runs on a CPU"):
            run(GpuConfig(parts=parts, out=str(tmp_path)))


BARE = """
import runpy, sys
for name in ("wandb", "torchao", "bert_score", "datasets", "flashinfer", "liger_kernel", "gguf", "lm_eval"):
    sys.modules[name] = None  # as if it were not installed
sys.argv = ["benchmark", "preset=mini", "device=cpu", "parts=[mixed]", "out=" + sys.argv[1]]
runpy.run_module("firstlab.benchmark", run_name="__main__")
"""


def test_the_command_without_optional_packages(tmp_path: Path) -> None:
    package = str(Path(conf_dir()).parent / "src")
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path / "out")],
        env={**gpu_parts.environment(), "PYTHONPATH": package},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of 1 targets met" in done.stdout
    assert json.loads((tmp_path / "out" / "mixed.json").read_text())["preset"] == "mini"
