"""Time our kernels of a decode step beside torch and FlashInfer, on one layer of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Microseconds of a function.
Clock = Callable[[Callable[[], object]], float]


def beside_flashinfer(config: Any, places: int, dtype: torch.dtype, device: torch.device, clock: Clock) -> list[dict]:
    """A row per operation for one token behind `places` others: microseconds of each library, and how far ours is off.

    Needs Triton and FlashInfer.

    `config` is that of a Llama-like model. FlashInfer's attention leaves out rotation and the writing of the new key
    and value, which ours does in the same launch.
    """
    import flashinfer

    from firstlab.engine.kernels.attention import attend
    from firstlab.engine.kernels.pointwise import rms_norm, silu_times_up

    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    x, norm, both = random(1, config.hidden_size), random(config.hidden_size), random(1, 2 * config.intermediate_size)
    gate, up = both.chunk(2, -1)
    query, kv = random(1, heads, dim), random(1, 2 * kv_heads, places + 1, dim)
    kept = kv.clone()
    at, ones = torch.tensor([places], device=device), torch.ones(places + 1, 1, dim, device=device, dtype=dtype)
    qkv = torch.cat([query, kv[:, :, places]], 1)  # what stands there already
    ended = torch.zeros(kv_heads, dtype=torch.int32, device=device)
    given = (at, ones, torch.zeros_like(ones), None, None, 0.0, 0.0, dim**-0.5, 16, 16, ended)
    keys, values = kept.chunk(2, 1)
    ours: dict[str, Callable[[], Tensor]] = {
        "RMS norm": lambda: rms_norm(x, norm, 1e-5),
        "SiLU times up": lambda: silu_times_up(both),
        "attention": lambda: attend(qkv, kv, *given),
    }
    plain: dict[str, Callable[[], Tensor]] = {
        "RMS norm": lambda: F.rms_norm(x, (x.shape[1],), norm, 1e-5),
        "SiLU times up": lambda: F.silu(gate) * up,
        "attention": lambda: F.scaled_dot_product_attention(
            query.view(1, heads, 1, dim), keys, values, enable_gqa=heads != kv_heads
        ).flatten(1),
    }
    theirs: dict[str, Callable[[], Tensor]] = {
        "RMS norm": lambda: flashinfer.rmsnorm(x, norm, 1e-5),
        "SiLU times up": lambda: flashinfer.silu_and_mul(both),
        "attention": lambda: flashinfer.single_decode_with_kv_cache(
            query[0], keys[0], values[0], kv_layout="HND"
        ).flatten()[None],
    }
    return [
        {
            "operation": name,
            "ours_us": clock(ours[name]),
            "torch_us": clock(plain[name]),
            "flashinfer_us": clock(theirs[name]),
            "off": ((ours[name]() - theirs[name]()).norm() / theirs[name]().norm()).item(),
        }
        for name in ours
    ]
