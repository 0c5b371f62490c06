"""Tell which process of a run this is."""

from __future__ import annotations

import torch.distributed as dist


def rank() -> tuple[int, int]:
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def gather(number: int) -> list[int]:
    """The number of every process, by rank."""
    if not dist.is_initialized():
        return [number]
    found: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(found, number)
    return found
