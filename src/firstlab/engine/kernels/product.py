"""Product of a few rows with a weight; the RMS norm before it, the bias and the residual after it are part of it.

    y = norm(x) · Wᵀ + b, or y += …      norm(x) = x ÷ sqrt(mean x² + ε) · g

x [rows, K], g [K], W [N, K], b [N], y [rows, N]. Reads N · K weights once, and little else: every program reads all
rows, which stand in the cache. The scale of a single row comes after the product, so that x is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from firstlab.engine.kernels.rows import add_product, inverse_rms, load_rows, load_weight, no_sums, padded, whole_sums


@triton.jit
def _product(
    x,
    norm,
    weight,
    bias,
    out,
    rows,
    n,
    k,
    stride_n,
    stride_k,
    eps,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    if NORM and ROWS > 1:
        scale = inverse_rms(x, row, rows, k, eps, ROWS, DEPTH)
    squares = tl.zeros((ROWS, DEPTH), tl.float32)
    sums = no_sums(ROWS, COLUMNS, DEPTH)
    for start in range(0, k, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        tile = load_weight(weight, column, inner, n, k, stride_n, stride_k, EVEN)
        some = load_rows(x, row, inner, rows, k)
        if NORM:
            if ROWS == 1:
                squares += some * some
            else:
                some = some * scale
            some = some * tl.load(norm + inner, mask=inner < k, other=0.0).to(tl.float32)[None, :]
        sums = add_product(sums, some, tile, ROWS)
    found = whole_sums(sums, ROWS)
    if NORM and ROWS == 1:
        found = found / tl.sqrt(tl.sum(squares, 1) / k + eps)[:, None]
    if BIAS:
        found += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    place = out + row[:, None] * n + column[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    if ADD:
        found += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, found.to(out.dtype.element_ty), mask=inside)


@torch.library.custom_op("firstlab::product", mutates_args={"out"})
def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    add: bool,
    out: Tensor,
    tile: list[int],
) -> None:
    """Write the product, or add it, to `out` [rows, N], which stands row by row like x.

    Args:
        x: [rows, K], at most 32 rows.
        weight: [N, K], in any order.
        bias: [N].
        norm: Weight of the RMS norm of x, [K]; None: x as it is.
        eps: Of the norm.
        add: To what `out` holds.
        tile: Columns and depth, powers of two; warps; stages.
    """
    (rows, k), n = x.shape, len(weight)
    columns, depth, warps, stages = tile
    _product[(triton.cdiv(n, columns),)](
        x,
        x if norm is None else norm,
        weight,
        x if bias is None else bias,
        out,
        rows,
        n,
        k,
        *weight.stride(),
        eps,
        NORM=norm is not None,
        BIAS=bias is not None,
        ADD=add,
        EVEN=n % columns == k % depth == 0,
        ROWS=padded(rows),
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=warps,
        num_stages=stages,
    )
