"""Attention of one new token in each of a few rows, whose keys and values it writes first; split over the length.

    q', k' = turn(norm(q)), turn(norm(k))          turn(z) = z · cos + roll(z, d ÷ 2) · sin, at the row's length t
    K[t], V[t] = k', v
    o = softmax(q' · K[: t + 1]ᵀ · scale) · V[: t + 1]

q, k, v stand side by side [rows, heads + 2 · kv heads, d]; K, V [rows, 2 · kv heads, places, d], of which 2 · t · d per
row and kv head are read once; cos, sin [places, d]. Each program takes one row, one kv head with the group of queries
that read it, and one of SPLITS equal parts of the row's length, as the device knows it: one capture serves any length.
It leaves its maximum m, its sum l of exp(score - m), and its mean o; the last of them to end weighs the means by
l · exp(m), so that attention is one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from firstlab.engine.kernels.rows import dot, overlap, wait_for_inputs

#: Numbers of parts that a program holds at a time when it combines them: 64 registers of each of its threads.
_COMBINED = 8192


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
def _read(
    keys,
    values,
    query,
    start,
    end,
    dim,
    real,
    scale,
    top,
    total,
    mixed,
    kind: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Maximum, sum and mix of scores [GROUP] once the places from start to end have joined them."""
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
    return top, total, mixed


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
    ended,
    out,
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
    AT_A_TIME: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait_for_inputs(OVERLAP)
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    here = tl.load(at + row).to(tl.int32)
    part = tl.cdiv(tl.cdiv(here + 1, SPLITS), PLACES) * PLACES
    start = split * part
    end = tl.minimum(start + part, here)  # of what was there before
    dim, member = tl.arange(0, WIDTH), tl.arange(0, GROUP)
    real, new_head = dim < DIM, HEADS + kv_head + tl.arange(0, 1)
    head, mine = kv_head * (HEADS // KV_HEADS) + member, member < HEADS // KV_HEADS

    cosine = tl.load(cos + here.to(tl.int64) * DIM + dim, mask=real, other=0.0).to(tl.float32)
    sine = tl.load(sin + here.to(tl.int64) * DIM + dim, mask=real, other=0.0).to(tl.float32)
    given = qkv + row * (HEADS + 2 * KV_HEADS) * DIM
    kind = kv.dtype.element_ty
    inside = mine[:, None] & real[None, :]
    query = _turned(given, head, query_norm, query_eps, cosine, sine, dim, inside, QUERY_NORM, DIM).to(kind)
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
    top, total, mixed = _read(
        keys, values, query, start, end, dim, real, scale, top, total, mixed, kind, GROUP, DIM, PLACES
    )
    mean = mixed / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        place = (row * HEADS + head)[:, None] * DIM + dim[None, :]
        tl.store(out + place, mean.to(out.dtype.element_ty), mask=inside)
    else:
        slot = (row * HEADS + head) * SPLITS + split
        tl.store(maxima + slot, top, mask=mine)
        tl.store(sums + slot, total, mask=mine)
        found = inside & (dim < tl.where(start <= here, DIM, 0))[None, :]
        tl.store(means + slot[:, None] * DIM + dim[None, :], mean, mask=found)
        tl.debug_barrier()  # all threads have written before one of them says so
        count = ended + row * KV_HEADS + kv_head
        if tl.atomic_add(count, 1) == SPLITS - 1:
            tl.store(count, 0)
            first_head = row * HEADS + kv_head * (HEADS // KV_HEADS)
            _combine(maxima, sums, means, out, first_head, HEADS // KV_HEADS, DIM, WIDTH, SPLITS, AT_A_TIME)


@triton.jit
def _combine(
    maxima,
    sums,
    means,
    out,
    first_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_A_TIME: tl.constexpr,
):
    """What the parts of some heads, from the first on, come to; other programs have written them, hence past L1."""
    member = tl.arange(0, triton.next_power_of_2(HEADS))
    head, mine = first_head + member, member < HEADS
    slot = head[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    top = tl.load(maxima + slot, mask=mine[:, None], other=0.0, cache_modifier=".cg")
    total = tl.load(sums + slot, mask=mine[:, None], other=1.0, cache_modifier=".cg")
    share = tl.exp(top - tl.max(top, 1)[:, None]) * total
    share = share / tl.sum(share, 1)[:, None]
    holds = mine[:, None] & (total > 0)  # parts behind the row's end hold nothing
    for first in tl.static_range(0, WIDTH, AT_A_TIME):
        dim = first + tl.arange(0, AT_A_TIME)
        inside = holds[:, :, None] & (dim < DIM)[None, None, :]
        part = tl.load(
            means + slot[:, :, None] * DIM + dim[None, None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )
        found = tl.sum(part * share[:, :, None], 1)
        place = out + head[:, None] * DIM + dim[None, :]
        tl.store(place, found.to(out.dtype.element_ty), mask=mine[:, None] & (dim < DIM)[None, :])


@torch.library.custom_op("firstlab::attend", mutates_args={"kv", "ended"})
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
    ended: Tensor,
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
        ended: [at least rows · kv heads] zeros of 32-bit integers, which count the parts meanwhile.
    """
    rows, _, dim = qkv.shape
    kv_heads = kv.shape[1] // 2
    heads = qkv.shape[1] - 2 * kv_heads
    group, width = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    out = qkv.new_empty(rows, heads * dim)
    maxima = sums = means = out
    if splits > 1:
        maxima = torch.empty(rows * heads, splits, dtype=torch.float32, device=qkv.device)
        sums, means = torch.empty_like(maxima), maxima.new_empty(rows * heads, splits, dim)
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
        ended,
        out,
        kv.stride(0),
        kv.stride(1),
        QUERY_NORM=query_norm is not None,
        KEY_NORM=key_norm is not None,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        WIDTH=width,
        SPLITS=splits,
        PLACES=places,
        AT_A_TIME=max(1, min(width, _COMBINED // (splits * triton.next_power_of_2(group)))),
        num_warps=4,
        num_stages=2,
        **overlap(qkv.device),
    )
    return out
