"""A stand-in for CUDA graphs on the CPU: what a body did is recorded once and done again, without its Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firstlab.engine.graphs import Graphs

aten = torch.ops.aten
# They wait for the device, or have outputs whose size depends on values; indexing with a boolean tensor does, too.
FORBIDDEN = {
    aten._local_scalar_dense.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        booleans = "index" in str(func) and any(each.dtype == torch.bool for each in tensors(args[1:2]))
        assert func not in FORBIDDEN and not booleans, f"{func} inside a graph"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Tape(Graphs):
    """As on a GPU, the first call of a replay runs the body, and later calls know only the addresses that it used.

    Attributes:
        played: Replays since the start, first calls included.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.played = 0

    def make(self, body: Callable[[], None]) -> Callable[[], None]:
        calls: list[tuple[Any, Any, Any, Any]] = []

        def replay() -> None:
            self.played += 1
            if not calls:
                with _Recorder() as recorder:
                    body()
                calls.extend(recorder.calls)
                return
            for func, args, kwargs, out in calls:
                for kept, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if kept.data_ptr() != new.data_ptr():  # neither a view nor in place
                        kept.copy_(new)

        return replay
