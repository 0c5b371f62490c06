"""The interpreter takes more than the compiler does: every kernel is compiled for GPUs, which needs none."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

PROGRAM = r"""
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from firstlab.engine.kernels import attention, pointwise, product as products
from firstlab.engine.kernels.attention import attend
from firstlab.engine.kernels.pointwise import rms_norm, rms_norm_and_reading, silu_times_up
from firstlab.engine.kernels.product import gated, product


class Driver:
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


triton.runtime.driver.set_active(Driver())
run, compiled = JITFunction.run, {}


def compile_only(kernel, *given, warmup, **options):
    done = run(kernel, *given, warmup=True, **options)
    [wait] = [each.start() for each in re.finditer("griddepcontrol.wait", done.asm["ptx"])]
    touch = re.search(r"(ld|st|cp\.async\S*)\.global", done.asm["ptx"]).start()
    correct = len(done.asm["cubin"]) > 0 and done.metadata.launch_pdl and wait < touch
    compiled.setdefault(kernel.__name__, []).append((correct, done.metadata.shared))


JITFunction.run = compile_only
some = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
# As on a GPU where one kernel starts while another ends: it must wait before it touches memory.
attention.overlap = pointwise.overlap = products.overlap = lambda device: {"OVERLAP": True, "launch_pdl": True}
for rows, tile in ((1, [4, 1024, 4, 3]), (32, [64, 128, 4, 3])):
    x, weight, out = some(rows, 2048), some(128, 2048), some(rows, 128)
    product(x, weight, None, None, x[0], 1e-5, rows > 1, out, tile)
    gated(x, weight, None, x[0], x[0], 1e-5, out[:, :64].contiguous(), tile)
    product(x, weight.to(torch.int8), torch.ones(128), None, None, 0.0, True, out, tile)
    gated(x, weight.to(torch.int8), torch.ones(128), x[0], x[0], 1e-5, out[:, :64].contiguous(), tile)
for heads, kv_heads, dim, splits, norm in ((8, 2, 128, 32, None), (4, 4, 96, 1, some(96))):
    kv, angles = some(2, 2 * kv_heads, 256, dim), some(256, 1, dim)
    qkv, at = some(2, heads + 2 * kv_heads, dim), torch.zeros(2, dtype=torch.long)
    attend(qkv, kv, at, angles, angles, norm, norm, 1e-5, 1e-5, 1.0, splits, 64, torch.zeros(8, dtype=torch.int32))
rms_norm(x, x[0], 1e-5)
rms_norm_and_reading(x, x[0], 1e-5, x[0].float())
silu_times_up(x)
for name, found in compiled.items():
    print(name, len(found), all(done for done, _ in found), max(shared for _, shared in found))
"""


def test_kernels_compile_for_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert set(found) == {"_product", "_attend", "_rms_norm", "_silu_times_up"}
    for line in found.values():
        _, compiled, shared = line.split()
        assert compiled == "True" and int(shared) <= 163 << 10
