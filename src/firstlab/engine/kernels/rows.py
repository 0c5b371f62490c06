"""What the kernels share: one row of a product is summed up by the threads, more go through tensor cores.

Branches that return need their `else`: Triton compiles what stands behind a branch without it, taken or not.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def padded(rows: int) -> int:
    """Rows that a program computes for these, at most 32: one, or as many as tensor cores take."""
    return 1 if rows == 1 else 16 if rows <= 16 else 32


@cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Options that start a kernel while the one before it ends, where GPUs can: Hopper and Blackwell of data centres.

    A decode step is some 200 kernels, and a microsecond between any two of them would be a twentieth of its time. The
    other Blackwells (12.x) are left out, as capturing such launches is known to fail there.
    """
    can = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)
    return {"OVERLAP": can} | ({"launch_pdl": True} if can else {})


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Comes before a kernel reads or writes anything: lets the next one start, and waits for all that came before."""
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def dot(one, other, sums):
    """sums + one · other, summed up in float32."""
    if _INTERPRETED:  # the interpreter takes the bits of bfloat16 for integers here
        return tl.dot(one.to(tl.float32), other.to(tl.float32), sums)
    else:
        return tl.dot(one, other, sums, input_precision="ieee")


@triton.jit
def load_rows(x, row, inner, rows, k):
    """Numbers `inner` of each row, [ROWS, DEPTH] in float32; zero outside."""
    inside = (row < rows)[:, None] & (inner < k)[None, :]
    return tl.load(x + row[:, None] * k + inner[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_weight(weight, column, inner, n, k, stride_n, stride_k, EVEN: tl.constexpr):
    """A tile [COLUMNS, DEPTH] of a weight [n, k], which is read once; EVEN: tiles never reach over its edges."""
    place = weight + column.to(tl.int64)[:, None] * stride_n + inner.to(tl.int64)[None, :] * stride_k
    if EVEN:
        return tl.load(place, eviction_policy="evict_first")
    else:
        inside = (column < n)[:, None] & (inner < k)[None, :]
        return tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def inverse_rms(x, row, rows, k, eps, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """1 ÷ sqrt(mean x² + eps) of each row, [ROWS, 1]."""
    squares = tl.zeros((ROWS, DEPTH), tl.float32)
    for start in range(0, k, DEPTH):
        some = load_rows(x, row, start + tl.arange(0, DEPTH), rows, k)
        squares += some * some
    return 1.0 / tl.sqrt(tl.sum(squares, 1) / k + eps)[:, None]


@triton.jit
def no_sums(ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr):
    """Where `add_product` starts."""
    return tl.zeros((COLUMNS, DEPTH if ROWS == 1 else ROWS), tl.float32)


@triton.jit
def add_product(sums, some, tile, KIND: tl.constexpr, ROWS: tl.constexpr):
    """Adds the product of rows [ROWS, DEPTH] in float32 and a tile of a weight [COLUMNS, DEPTH], both as KIND."""
    if ROWS == 1:
        return sums + tile.to(tl.float32) * some
    elif tile.dtype == KIND:
        return dot(tile, tl.trans(some.to(KIND)), sums)
    else:  # by way of float32: the interpreter takes integers for the bits of bfloat16
        return dot(tile.to(tl.float32).to(KIND), tl.trans(some.to(KIND)), sums)


@triton.jit
def whole_sums(sums, ROWS: tl.constexpr):
    """The product [ROWS, COLUMNS] after all tiles."""
    if ROWS == 1:
        return tl.sum(sums, 1)[None, :]
    else:
        return tl.trans(sums)
