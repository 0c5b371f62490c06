"""Attention of one new token in each of a few rows, whose keys and values it writes first; split over the length.

    q', k' = turn(norm(q)), turn(norm(k))          turn(z) = z · cos + roll(z, d ÷ 2) · sin, at the row's length t
    K[t], V[t] = k', v
    o = softmax(q' · K[: t + 1]ᵀ · scale) · V[: t + 1]

q, k, v stand side by side [rows, heads + 2 · kv heads, d]; K, V [rows, 2 · kv heads, places, d], of which 2 · t · d per
row and kv head are read once; cos, sin [places, d]. Each program takes one row, one kv head with the group of queries
that read it, and one of SPLITS equal parts of the row's length, as the device knows it: one capture serves any length.
It leaves its maximum m, its sum l of exp(score - m), and its mean o, which the second kernel weighs by l · exp(m).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from firstlab.engine.kernels.rows import dot


@triton.jit
def _turned(heads, head, norm, eps, cosine, sine, dim, inside, NORM: tl.constexpr, DIM: tl.constexpr):
    """Heads [n, WIDTH] in float32, normed and turned."""
    other = (dim + DIM // 2) % DIM
    here = tl.load(heads + head[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(tl.float32)
    there = tl.load(heads + head[:, None] * DIM + other[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORM:
        length = tl.sqrt(tl.sum(here * here, 1) / DIM + eps)[:, None]
        here = here / length * tl.load(norm + dim, mask=dim < DIM, other=0.0).to(tl.float32)[None, :]
        there = there / length * tl.load(norm + other, mask=dim < DIM, other=0.0).to(tl.float32)[None, :]
    return here * cosine[None, :] + there * sine[None, :]


@triton.jit
def _attend(
    qkv,
    kv,
    at,
    cos,
    sin,
    query_norm,
    key_norm,
    query_eps,
    key_eps,
    scale,
    maxima,
    sums,
    means,
    stride_row,
    stride_head,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    PLACES: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    here = tl.load(at + row).to(tl.int32)
    part = tl.cdiv(tl.cdiv(here + 1, SPLITS), PLACES) * PLACES
    start = split * part
    end = tl.minimum(start + part, here)  # of what was there before
    dim, member = tl.arange(0, WIDTH), tl.arange(0, GROUP)
    real, one = dim < DIM, tl.arange(0, 1)
    head = kv_head * (HEADS // KV_HEADS) + member
    mine = member < HEADS // KV_HEADS
    kind = kv.dtype.element_ty

    cosine = tl.load(cos + here.to(tl.int64) * DIM + dim, mask=real, other=0.0).to(tl.float32)
    sine = tl.load(sin + here.to(tl.int64) * DIM + dim, mask=real, other=0.0).to(tl.float32)
    given = qkv + row * (HEADS + 2 * KV_HEADS) * DIM
    inside = mine[:, None] & real[None, :]
    query = _turned(given, head, query_norm, query_eps, cosine, sine, dim, inside, QUERY_NORM, DIM).to(kind)
    new_head = HEADS + kv_head + one
    new_key = _turned(given, new_head, key_norm, key_eps, cosine, sine, dim, real[None, :], KEY_NORM, DIM).to(kind)
    new_value = tl.load(given + (new_head + KV_HEADS)[:, None] * DIM + dim[None, :], mask=real[None, :], other=0.0)

    keys = kv + row * stride_row + kv_head * stride_head
    values = kv + row * stride_row + (kv_head + KV_HEADS) * stride_head
    # The new place is the first that its part reads, and no other part does.
    is_last = (start <= here) & (here < start + part)
    new = (dim < tl.where(is_last, DIM, 0))[None, :]
    written = here.to(tl.int64) * DIM + dim[None, :]
    tl.store(keys + written, new_key, mask=new)
    tl.store(values + written, new_value, mask=new)
    new_score = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), 1) * scale
    top = tl.where(is_last, new_score, float("-inf"))
    total = tl.full((GROUP,), 1.0, tl.float32) * is_last
    mixed = tl.zeros((GROUP, WIDTH), tl.float32) + tl.where(is_last, new_value.to(tl.float32), 0.0)
    for first in range(start, end, PLACES):
        place = first + tl.arange(0, PLACES)
        known = place < end
        offset = place.to(tl.int64)[:, None] * DIM + dim[None, :]
        key = tl.load(keys + offset, mask=known[:, None] & real[None, :], other=0.0)
        value = tl.load(values + offset, mask=known[:, None] & real[None, :], other=0.0)
        score = dot(query, tl.trans(key), tl.zeros((GROUP, PLACES), tl.float32)) * scale
        score = tl.where(known[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        share = tl.exp(score - higher[:, None])
        kept = tl.exp(top - higher)
        total = total * kept + tl.sum(share, 1)
        mixed = dot(share.to(kind), value, mixed * kept[:, None])
        top = higher

    slot = (row * HEADS + head) * SPLITS + split
    found = inside & (dim < tl.where(start <= here, DIM, 0))[None, :]
    tl.store(maxima + slot, top, mask=mine)
    tl.store(sums + slot, total, mask=mine)
    mean = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(means + slot[:, None] * DIM + dim[None, :], mean.to(means.dtype.element_ty), mask=found)


@triton.jit
def _combine(maxima, sums, means, out, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)  # of all rows
    slot, dim = head * SPLITS + tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    top, total = tl.load(maxima + slot), tl.load(sums + slot)
    share = tl.exp(top - tl.max(top, 0)) * total
    inside = (total > 0)[:, None] & (dim < DIM)[None, :]  # parts behind the row's end hold nothing
    mean = tl.load(means + slot[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    found = tl.sum(mean * share[:, None], 0) / tl.sum(share, 0)
    tl.store(out + head * DIM + dim, found.to(out.dtype.element_ty), mask=dim < DIM)


@torch.library.custom_op("firstlab::attend", mutates_args={"kv"})
def attend(
    qkv: Tensor,
    kv: Tensor,
    at: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    query_eps: float,
    key_eps: float,
    scale: float,
    splits: int,
    places: int,
) -> Tensor:
    """What the queries read, [rows, heads · d]; the new keys and values go to their places.

    Args:
        qkv: [rows, heads + 2 · kv heads, d], neither normed nor turned, standing row by row.
        kv: [at least rows, 2 · kv heads, places, d], keys before values; each head stands place by place.
        at: [rows], where the new token goes; behind it nothing is read.
        cos, sin: [places, 1, d] as `LlamaStep` keeps them: the sine of the first half negative.
        query_norm, key_norm: Weights [d] of the RMS norms of heads; None: there are none.
        query_eps, key_eps: Of these norms.
        scale: Of the scores.
        splits: Parts of the length, a power of two.
        places: Of keys and values read at a time, a power of two from 16.
    """
    rows, _, dim = qkv.shape
    kv_heads = kv.shape[1] // 2
    heads = qkv.shape[1] - 2 * kv_heads
    width = max(16, triton.next_power_of_2(dim))
    maxima = torch.empty(rows * heads, splits, dtype=torch.float32, device=qkv.device)
    sums = torch.empty_like(maxima)
    out = qkv.new_empty(rows, heads * dim)
    means = out if splits == 1 else maxima.new_empty(rows * heads, splits, dim)
    _attend[(rows, kv_heads, splits)](
        qkv,
        kv,
        at,
        cos,
        sin,
        qkv if query_norm is None else query_norm,
        qkv if key_norm is None else key_norm,
        query_eps,
        key_eps,
        scale,
        maxima,
        sums,
        means,
        kv.stride(0),
        kv.stride(1),
        QUERY_NORM=query_norm is not None,
        KEY_NORM=key_norm is not None,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=max(16, triton.next_power_of_2(heads // kv_heads)),
        DIM=dim,
        WIDTH=width,
        SPLITS=splits,
        PLACES=places,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        _combine[(rows * heads,)](maxima, sums, means, out, DIM=dim, WIDTH=width, SPLITS=splits, num_warps=4)
    return out
