"""Products of a few rows with a weight; the RMS norm before, and the bias, gate or residual after are part of them.

    y = norm(x) · Wᵀ · s + b, or y += …      norm(x) = x ÷ sqrt(mean x² + ε) · g
    a = silu(y₁) · y₂                        y₁, y₂ the halves of y, silu(y) = y ÷ (1 + exp(-y))

x [rows, K], g [K], W [N, K], b [N], y [rows, N], a [rows, N ÷ 2]; scales s [N] where W holds 8-bit integers. Reads
N · K weights once, and little else: every program reads all rows, which stand in the cache. The scale of a single row
comes after the product, so that x is read once. Gate and up never leave the chip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from firstlab.engine.kernels.rows import (
    add_product,
    inverse_rms,
    load_rows,
    load_weight,
    no_sums,
    overlap,
    padded,
    wait_for_inputs,
    whole_sums,
)


@triton.jit
def _product(
    x,
    norm,
    weight,
    up_weight,
    scales,
    bias,
    out,
    rows,
    n,
    k,
    stride_n,
    stride_k,
    eps,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_inputs(OVERLAP)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    if NORM and ROWS > 1:
        scale = inverse_rms(x, row, rows, k, eps, ROWS, DEPTH)
    squares = tl.zeros((ROWS, DEPTH), tl.float32)
    sums = no_sums(ROWS, COLUMNS, DEPTH)
    if GATED:
        ups = no_sums(ROWS, COLUMNS, DEPTH)
    for start in range(0, k, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        tile = load_weight(weight, column, inner, n, k, stride_n, stride_k, EVEN)
        if GATED:
            up_tile = load_weight(up_weight, column, inner, n, k, stride_n, stride_k, EVEN)
        some = load_rows(x, row, inner, rows, k)
        if NORM:
            if ROWS == 1:
                squares += some * some
            else:
                some = some * scale
            some = some * tl.load(norm + inner, mask=inner < k, other=0.0).to(tl.float32)[None, :]
        sums = add_product(sums, some, tile, x.dtype.element_ty, ROWS)
        if GATED:
            ups = add_product(ups, some, up_tile, x.dtype.element_ty, ROWS)
    length = 1.0
    if NORM and ROWS == 1:
        length = tl.sqrt(tl.sum(squares, 1) / k + eps)[:, None]
    found = _behind(whole_sums(sums, ROWS) / length, scales, bias, column, n, SCALED, BIAS)
    if GATED:
        up = _behind(whole_sums(ups, ROWS) / length, scales + n, bias + n, column, n, SCALED, BIAS)
        found = found * tl.sigmoid(found) * up
    place = out + row[:, None] * n + column[None, :]
    inside = (row < rows)[:, None] & (column < n)[None, :]
    if ADD:
        found += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, found.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _behind(found, scales, bias, column, n, SCALED: tl.constexpr, BIAS: tl.constexpr):
    """What comes behind a product [ROWS, COLUMNS]."""
    if SCALED:
        found = found * tl.load(scales + column, mask=column < n, other=0.0)[None, :]
    if BIAS:
        found = found + tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    return found


@torch.library.custom_op("firstlab::product", mutates_args={"out"})
def product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
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
        scales: [N] in float32, of a weight of 8-bit integers; None: it holds the numbers themselves.
        bias: [N].
        norm: Weight of the RMS norm of x, [K]; None: x as it is.
        eps: Of the norm.
        add: To what `out` holds.
        tile: Columns and depth, powers of two; warps; stages.
    """
    _launch(x, weight, scales, bias, norm, eps, out, tile, len(weight), add, False)


@torch.library.custom_op("firstlab::gated", mutates_args={"out"})
def gated(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm: Tensor,
    eps: float,
    out: Tensor,
    tile: list[int],
) -> None:
    """Write silu(gate) · up to `out` [rows, N]; the arguments are those of `product`, with weight [2 N, K]."""
    _launch(x, weight, scales, bias, norm, eps, out, tile, len(weight) // 2, False, True)


def _launch(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    out: Tensor,
    tile: list[int],
    n: int,
    add: bool,
    gate: bool,
) -> None:
    rows, k = x.shape
    columns, depth, warps, stages = tile
    _product[(triton.cdiv(n, columns),)](
        x,
        x if norm is None else norm,
        weight,
        weight[n:] if gate else weight,
        x if scales is None else scales,
        x if bias is None else bias,
        out,
        rows,
        n,
        k,
        *weight.stride(),
        eps,
        NORM=norm is not None,
        SCALED=scales is not None,
        BIAS=bias is not None,
        GATED=gate,
        ADD=add,
        EVEN=n % columns == k % depth == 0,
        ROWS=padded(rows),
        COLUMNS=columns,
        DEPTH=depth,
        num_warps=warps,
        num_stages=stages,
        **overlap(x.device),
    )
