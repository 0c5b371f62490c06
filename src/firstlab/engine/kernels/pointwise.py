"""What stands between the libraries' products of larger batches, each in one pass: RMS norm, and SiLU times up.

y = x ÷ sqrt(mean x² + ε) · g            x, y [rows, K], g [K]; reads and writes rows · K numbers
p = x · r, n = sqrt(Σ x²)                the reading of a router r [K] from the same pass, p, n [rows] in float32
a = silu(h[:, :N]) · h[:, N:]            h [rows, 2 N], a [rows, N]; reads 2, writes 1 · rows · N numbers
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from firstlab.engine.kernels.rows import overlap, wait_for_inputs


@triton.jit
def _rms_norm(
    x,
    norm,
    out,
    router,
    products,
    lengths,
    k,
    eps,
    READ: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_inputs(OVERLAP)
    inner = tl.arange(0, WIDTH)
    start = tl.program_id(0).to(tl.int64) * k
    some = tl.load(x + start + inner, mask=inner < k, other=0.0).to(tl.float32)
    squares = tl.sum(some * some, 0)
    if READ:
        weight = tl.load(router + inner, mask=inner < k, other=0.0).to(tl.float32)
        tl.store(products + tl.program_id(0), tl.sum(some * weight, 0))
        tl.store(lengths + tl.program_id(0), tl.sqrt(squares))
    some = some / tl.sqrt(squares / k + eps)
    some = some * tl.load(norm + inner, mask=inner < k, other=0.0).to(tl.float32)
    tl.store(out + start + inner, some.to(out.dtype.element_ty), mask=inner < k)


@triton.jit
def _silu_times_up(both, out, n, WIDTH: tl.constexpr, OVERLAP: tl.constexpr):
    wait_for_inputs(OVERLAP)
    row, inner = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    gate = tl.load(both + row * 2 * n + inner, mask=inner < n, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * n + n + inner, mask=inner < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + inner, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inner < n)


@torch.library.custom_op("firstlab::rms_norm", mutates_args=())
def rms_norm(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """Of every row of x [rows, K], which stands row by row."""
    out = torch.empty_like(x)
    _launch_norm(x, norm, eps, out, out, out, out, False)
    return out


@torch.library.custom_op("firstlab::rms_norm_and_reading", mutates_args=())
def rms_norm_and_reading(x: Tensor, norm: Tensor, eps: float, router: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The RMS norm of x [rows, K], its products with a router [K] and its lengths [rows], both in float32."""
    out = torch.empty_like(x)
    products = torch.empty(len(x), dtype=torch.float32, device=x.device)
    lengths = torch.empty_like(products)
    _launch_norm(x, norm, eps, out, router, products, lengths, True)
    return out, products, lengths


def _launch_norm(
    x: Tensor, norm: Tensor, eps: float, out: Tensor, router: Tensor, products: Tensor, lengths: Tensor, read: bool
) -> None:
    width = triton.next_power_of_2(x.shape[1])
    warps = min(max(width // 512, 1), 16)
    given = (x, norm, out, router, products, lengths, x.shape[1], eps)
    _rms_norm[(len(x),)](*given, READ=read, WIDTH=width, num_warps=warps, **overlap(x.device))


@torch.library.custom_op("firstlab::silu_times_up", mutates_args=())
def silu_times_up(both: Tensor) -> Tensor:
    """[rows, N] of gate and up side by side [rows, 2 N], which stand row by row."""
    rows, n = len(both), both.shape[1] // 2
    out = both.new_empty(rows, n)
    _silu_times_up[(rows, triton.cdiv(n, 1024))](both, out, n, WIDTH=1024, num_warps=4, **overlap(both.device))
    return out
