"""First half of the MLP for a few rows: RMS norm, gate and up products, SiLU and their product in one kernel.

    a = silu(g) · u      [g u] = norm(x) · Wᵀ + b      silu(g) = g ÷ (1 + exp(-g))

x [rows, K], W [2 N, K] with gate before up, b [2 N], a [rows, N]. Reads 2 · N · K weights once, and little else; g and
u never leave the chip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from firstlab.engine.kernels.rows import add_product, inverse_rms, load_rows, load_weight, no_sums, padded, whole_sums


@triton.jit
def _gated(
    x,
    norm,
    gate_weight,
    up_weight,
    bias,
    out,
    rows,
    n,
    k,
    stride_n,
    stride_k,
    eps,
    BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    if ROWS > 1:
        scale = inverse_rms(x, row, rows, k, eps, ROWS, DEPTH)
    squares = tl.zeros((ROWS, DEPTH), tl.float32)
    gates, ups = no_sums(ROWS, COLUMNS, DEPTH), no_sums(ROWS, COLUMNS, DEPTH)
    for start in range(0, k, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        gate_tile = load_weight(gate_weight, column, inner, n, k, stride_n, stride_k, EVEN)
        up_tile = load_weight(up_weight, column, inner, n, k, stride_n, stride_k, EVEN)
        some = load_rows(x, row, inner, rows, k)
        if ROWS == 1:
            squares += some * some
        else:
            some = some * scale
        some = some * tl.load(norm + inner, mask=inner < k, other=0.0).to(tl.float32)[None, :]
        gates = add_product(gates, some, gate_tile, ROWS)
        ups = add_product(ups, some, up_tile, ROWS)
    gate, up = whole_sums(gates, ROWS), whole_sums(ups, ROWS)
    if ROWS == 1:
        length = tl.sqrt(tl.sum(squares, 1) / k + eps)[:, None]
        gate, up = gate / length, up / length
    if BIAS:
        gate += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + n + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    found = gate * tl.sigmoid(gate) * up
    inside = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(out + row[:, None] * n + column[None, :], found.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("firstlab::gated", mutates_args={"out"})
def gated(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor, eps: float, out: Tensor, tile: list[int]
) -> None:
    """Write silu(gate) · up to `out` [rows, N]; the arguments are those of `product`, with weight [2 N, K]."""
    (rows, k), n = x.shape, len(weight) // 2
    columns, depth, warps, stages = tile
    _gated[(triton.cdiv(n, columns),)](
        x,
        norm,
        weight,
        weight[n:],
        x if bias is None else bias,
        out,
        rows,
        n,
        k,
        *weight.stride(),
        eps,
        BIAS=bias is not None,
        EVEN=n % columns == k % depth == 0,
        ROWS=padded(rows),
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=warps,
        num_stages=stages,
    )
