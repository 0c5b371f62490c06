"""Every kernel against plain torch in float64: on a CPU in Triton's interpreter, on a GPU compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from firstlab.engine.kernels.attention import attend
from firstlab.engine.kernels.pointwise import rms_norm, rms_norm_and_reading, silu_times_up
from firstlab.engine.kernels.product import gated, product
from firstlab.engine.kernels.rows import overlap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


class Numbers:
    """Random tensors of one type."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self._dtype, self._generator = dtype, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(DEVICE, self._dtype)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def assert_as_close_as_torch(found: Tensor, reference: Callable[..., Tensor], *given: Any) -> None:
    """Off from float64 by hardly more than plain torch in the same type is, and by little anyway."""

    def as_(dtype: torch.dtype) -> Tensor:
        return reference(
            *(each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each for each in given)
        )

    exact = as_(torch.float64)
    eps = torch.finfo(found.dtype).eps
    off = (found.double() - exact).norm() / exact.norm()
    assert off <= 2 * (as_(found.dtype).double() - exact).norm() / exact.norm() + eps / 2
    assert off < 10 * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 32])
@pytest.mark.parametrize(
    ("n", "k", "norm", "bias", "add", "tile"),
    [
        (48, 96, True, True, False, (16, 32, 4, 3)),
        (37, 75, True, False, False, (16, 32, 4, 2)),
        (32, 64, False, False, True, (8, 64, 2, 3)),
        (21, 130, False, True, True, (32, 64, 4, 3)),
    ],
)
def test_product(dtype: torch.dtype, rows: int, n: int, k: int, norm: bool, bias: bool, add: bool, tile: Any) -> None:
    if rows > 1:
        tile = (max(16, tile[0]), *tile[1:])
    random = Numbers(dtype)
    x, weight, b, g, before = random(rows, k), random(n, k, scale=0.2), random(n), random(k), random(rows, n)

    def reference(x: Tensor, weight: Tensor, b: Tensor, g: Tensor, before: Tensor) -> Tensor:
        found = F.linear(normed(x, g) if norm else x, weight, b if bias else None)
        return before + found if add else found

    if dtype == torch.float32:  # column by column, as on a CPU
        weight = weight.t().contiguous().t()
    out = before.clone()
    product(x, weight, None, b if bias else None, g if norm else None, EPS, add, out, list(tile))
    assert_as_close_as_torch(out, reference, x, weight, b, g, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 32])
@pytest.mark.parametrize(("n", "k", "bias"), [(48, 64, False), (21, 75, True)])
def test_gated(dtype: torch.dtype, rows: int, n: int, k: int, bias: bool) -> None:
    random = Numbers(dtype)
    x, weight, b, g = random(rows, k), random(2 * n, k, scale=0.2), random(2 * n), random(k)

    def reference(x: Tensor, weight: Tensor, b: Tensor, g: Tensor) -> Tensor:
        gate, up = F.linear(normed(x, g), weight, b if bias else None).chunk(2, -1)
        return F.silu(gate) * up

    out = x.new_empty(rows, n)
    gated(x, weight, None, b if bias else None, g, EPS, out, [16, 32, 4, 2])
    assert_as_close_as_torch(out, reference, x, weight, b, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 17])
def test_eight_bit_weights(dtype: torch.dtype, rows: int) -> None:
    random, (n, k) = Numbers(dtype), (42, 75)
    x, b, g, before = random(rows, k), random(n), random(k), random(rows, n)
    generator = torch.Generator().manual_seed(1)
    integers = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator).to(DEVICE)
    scales = torch.rand(n, generator=generator).to(DEVICE) / 100 + 0.001

    def reference(x: Tensor, integers: Tensor, scales: Tensor, b: Tensor, g: Tensor, before: Tensor) -> Tensor:
        return before + F.linear(normed(x, g), integers.to(x.dtype) * scales.unsqueeze(1), b)

    out = before.clone()
    product(x, integers, scales, b, g, EPS, True, out, [16, 32, 4, 2])
    assert_as_close_as_torch(out, reference, x, integers, scales, b, g, before)

    def gate_reference(x: Tensor, integers: Tensor, scales: Tensor, b: Tensor, g: Tensor) -> Tensor:
        gate, up = F.linear(normed(x, g), integers.to(x.dtype) * scales.unsqueeze(1), b).chunk(2, -1)
        return F.silu(gate) * up

    out = x.new_empty(rows, n // 2)
    gated(x, integers, scales, b, g, EPS, out, [16, 32, 4, 2])
    assert_as_close_as_torch(out, gate_reference, x, integers, scales, b, g)


def test_a_norm_of_large_numbers_in_half_precision() -> None:
    """They would overflow if the weight of the norm came before its scale."""
    random = Numbers(torch.float16)
    for rows in (1, 2):
        x, weight, g = random(rows, 64, scale=9000), random(32, 64, scale=0.2), random(64, scale=20)
        out = x.new_empty(rows, 32)
        product(x, weight, None, None, g, EPS, False, out, [16, 32, 4, 2])
        exact = normed(x.double(), g.double()) @ weight.double().t()
        assert (out.double() - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(1, 75), (3, 128), (32, 600)])
def test_rms_norm_and_silu_times_up(dtype: torch.dtype, rows: int, k: int) -> None:
    random = Numbers(dtype)
    x, g, both = random(rows, k), random(k), random(rows, 2 * k)
    assert_as_close_as_torch(rms_norm(x, g, EPS), normed, x, g)
    router = torch.randn(k, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    same, products, lengths = rms_norm_and_reading(x, g, EPS, router)
    assert torch.equal(same, rms_norm(x, g, EPS))
    assert_as_close_as_torch(products, lambda x, router: x.to(router.dtype) @ router, x.float(), router)
    assert_as_close_as_torch(lengths, lambda x: x.norm(dim=-1), x.float())
    assert_as_close_as_torch(silu_times_up(both), lambda both: F.silu(both[:, :k]) * both[:, k:], both)


def attention(
    qkv: Tensor, kv: Tensor, at: Tensor, cos: Tensor, sin: Tensor, query_norm: Any, key_norm: Any, splits: int = 1
) -> tuple[Tensor, Tensor]:
    """Plain torch, row by row: what the queries read, and all keys and values afterwards."""
    kv, read = kv.clone(), []
    kv_heads, dim = kv.shape[1] // 2, kv.shape[3]

    def turned(x: Tensor, norm: Any, row: int) -> Tensor:
        x = x if norm is None else normed(x, norm)
        return x * cos[at[row]] + x.roll(dim // 2, -1) * sin[at[row]]

    for row, (heads, end) in enumerate(zip(qkv, (at + 1).tolist(), strict=True)):
        query, key, value = heads.split([len(heads) - 2 * kv_heads, kv_heads, kv_heads])
        kv[row, :kv_heads, end - 1] = turned(key, key_norm, row)
        kv[row, kv_heads:, end - 1] = value
        keys, values = (each.repeat_interleave(len(query) // kv_heads, 0) for each in kv[row, :, :end].chunk(2))
        scores = torch.einsum("hd,hpd->hp", turned(query, query_norm, row), keys) * dim**-0.5
        read.append(torch.einsum("hp,hpd->hd", scores.softmax(-1), values).flatten())
    return torch.stack(read), kv


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "has_norm", "splits", "lengths"),
    [
        (4, 2, 16, False, 4, [0]),
        (6, 2, 24, False, 4, [99]),
        (2, 2, 16, True, 1, [63, 64]),
        (4, 1, 8, True, 4, [15, 16, 17, 80]),
        (34, 2, 16, False, 1, [40, 31]),
        (34, 2, 16, False, 64, [98, 3]),
        (10, 2, 20, False, 64, [99]),
    ],
)
def test_attention(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, has_norm: bool, splits: int, lengths: list[int]
) -> None:
    random, places = Numbers(dtype), 100
    qkv = random(len(lengths), heads + 2 * kv_heads, dim)
    kv = random(len(lengths) + 1, 2 * kv_heads, places, dim)
    at = torch.tensor(lengths, device=DEVICE)
    for row, length in enumerate(lengths):
        kv[row, :, length:] = torch.nan  # what another row has left there is never read
    cos, sin = random(places, 1, dim).clamp(-1, 1), random(places, 1, dim).clamp(-1, 1)
    norms = (random(dim), random(dim)) if has_norm else (None, None)
    mine, ended = kv.clone(), torch.zeros(len(lengths) * kv_heads, dtype=torch.int32, device=DEVICE)
    read = attend(qkv, mine, at, cos, sin, *norms, EPS, EPS, dim**-0.5, splits, 16, ended)
    assert not ended.any()  # ready for the next call

    given = (qkv, kv, at, cos, sin, *norms)
    assert_as_close_as_torch(read, lambda *given: attention(*given)[0], *given)
    rows = torch.arange(len(lengths), device=DEVICE)
    assert_as_close_as_torch(mine[rows, :, at], lambda *given: attention(*given)[1][rows, :, at], *given)
    mine[rows, :, at] = kv[rows, :, at] = 0
    torch.testing.assert_close(mine, kv, rtol=0, atol=0, equal_nan=True)  # nothing else is written


@pytest.mark.parametrize(("length", "splits", "places"), [(1021, 8, 64), (131_070, 4, 8192)])
def test_attention_on_a_long_cache(length: int, splits: int, places: int) -> None:
    """Parts of many readings each, unlike in length and with one maximum far above the others."""
    if DEVICE == "cuda":
        places = 64  # more do not fit
    random = Numbers(torch.float32)
    qkv, kv = random(1, 4, 16), random(1, 2, length + 3, 16)
    kv[0, 0, length - 300] = 9 * qkv[0, 0]
    one, zero = torch.ones(length + 3, 1, 16, device=DEVICE), torch.zeros(length + 3, 1, 16, device=DEVICE)
    given = (qkv, kv, torch.tensor([length], device=DEVICE), one, zero, None, None)
    ended = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    settings = (0.0, 0.0, 0.25, splits, places, ended)
    read = attend(*(each.clone() if each is not None else None for each in given), *settings)
    assert_as_close_as_torch(read, lambda *given: attention(*given)[0], *given)


@pytest.mark.parametrize(("major", "overlaps"), [(8, False), (9, True), (10, True), (12, False)])
def test_kernels_overlap_where_the_device_can(monkeypatch: pytest.MonkeyPatch, major: int, overlaps: bool) -> None:
    """What waits for nothing must not be launched early, and the other way round it would be of no use."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    options = overlap.__wrapped__(torch.device("cuda"))
    assert options["OVERLAP"] == overlaps == options.get("launch_pdl", False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert overlap.__wrapped__(torch.device("cuda")) == {"OVERLAP": False}
