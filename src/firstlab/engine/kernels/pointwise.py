"""What stands between the libraries' products of larger batches, each in one pass: RMS norm, and SiLU times up.

y = x ÷ sqrt(mean x² + ε) · g            x, y [rows, K], g [K]; reads and writes rows · K numbers
a = silu(h[:, :N]) · h[:, N:]            h [rows, 2 N], a [rows, N]; reads 2, writes 1 · rows · N numbers
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x, norm, out, k, eps, WIDTH: tl.constexpr):
    inner = tl.arange(0, WIDTH)
    start = tl.program_id(0).to(tl.int64) * k
    some = tl.load(x + start + inner, mask=inner < k, other=0.0).to(tl.float32)
    some = some / tl.sqrt(tl.sum(some * some, 0) / k + eps)
    some = some * tl.load(norm + inner, mask=inner < k, other=0.0).to(tl.float32)
    tl.store(out + start + inner, some.to(out.dtype.element_ty), mask=inner < k)


@triton.jit
def _silu_times_up(both, out, n, WIDTH: tl.constexpr):
    row, inner = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(both + row * 2 * n + inner, mask=inner < n, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * n + n + inner, mask=inner < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + inner, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inner < n)


@torch.library.custom_op("firstlab::rms_norm", mutates_args=())
def rms_norm(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Of every row of x [rows, K], which stands row by row."""
    out = torch.empty_like(x)
    width = triton.next_power_of_2(x.shape[1])
    _rms_norm[(len(x),)](x, norm, out, x.shape[1], eps, WIDTH=width, num_warps=min(max(width // 512, 1), 16))
    return out


@torch.library.custom_op("firstlab::silu_times_up", mutates_args=())
def silu_times_up(both: Tensor) -> Tensor:
    """[rows, N] of gate and up side by side [rows, 2 N], which stand row by row."""
    rows, n = len(both), both.shape[1] // 2
    out = both.new_empty(rows, n)
    _silu_times_up[(rows, triton.cdiv(n, 1024))](both, out, n, WIDTH=1024, num_warps=4)
    return out
