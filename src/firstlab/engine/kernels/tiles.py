"""Choose how a product runs: with which tiles of our kernel, or through the library; measured per device and shape.

What has been measured for the project stands in `KNOWN`; the rest is measured where it is first needed, and kept in
`tiles.json` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from firstlab.engine.kernels.rows import padded

#: More rows go through the library.
MOST_ROWS = 32
#: Smaller weights, in numbers, take no time worth measuring.
_SMALL = 1 << 20


class Tile(NamedTuple):
    """Columns and depth of the part of the weight that a program reads at a time; its warps; loads under way."""

    columns: int
    depth: int
    warps: int = 4
    stages: int = 3


#: One row: few columns and a long depth, whose sums stand in registers. More rows: a tile for the tensor cores.
_ONE_ROW = [Tile(4, 1024), Tile(8, 512), Tile(4, 1024, 2), Tile(4, 2048), Tile(2, 1024, 2), Tile(1, 2048, 8)]
_ROWS = [
    Tile(32, 64, 4, 2),
    Tile(32, 128, 4),
    Tile(16, 256, 4),
    Tile(32, 256, 4),
    Tile(64, 128, 4, 4),
    Tile(128, 64, 4, 4),
]

#: In the interpreter a program takes as long whatever its size.
_INTERPRETED = Tile(256, 256)

#: Device, kind, padded rows, columns N and depth K of the weight, type; None: the library.
KNOWN: dict[str, Tile | None] = {
    "NVIDIA H200 norm_product 1 6144 4096 bfloat16": Tile(8, 512),
    "NVIDIA H200 product 1 4096 4096 bfloat16": Tile(4, 1024, 2),
    "NVIDIA H200 product 1 4096 14336 bfloat16": Tile(4, 2048),
    "NVIDIA H200 gated 1 14336 4096 bfloat16": Tile(4, 1024),
}


class Tiles:
    """The choice for every product.

    Args:
        device: A CPU, where Triton's interpreter runs, measures nothing.
        file: What has been measured; by default in the user's cache folder.
    """

    def __init__(self, device: torch.device, file: Path | None = None) -> None:
        self._measures = device.type == "cuda"
        self._device = torch.cuda.get_device_name(device) if self._measures else device.type
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._file = file or cache / "firstlab" / f"tiles-triton{triton.__version__}.json"
        self._known = KNOWN | (_read(self._file) if self._measures else {})

    def __call__(
        self, kind: str, rows: int, shape: tuple[int, int], dtype: torch.dtype, run: Callable[[Tile | None], object]
    ) -> Tile | None:
        """How to multiply `rows` rows by a weight of this shape; None: through the library.

        `run` does it once, with what it is given; it is called only where this has to be measured.
        """
        if rows > MOST_ROWS:
            return None
        name = " ".join(map(str, (self._device, kind, padded(rows), *shape, str(dtype).removeprefix("torch."))))
        if name not in self._known:
            if not self._measures:
                return _fitting(_INTERPRETED, *shape)
            candidates = [_fitting(tile, *shape) for tile in (_ONE_ROW if rows == 1 else _ROWS)]
            if shape[0] * shape[1] < _SMALL:
                return candidates[0]
            self._known[name] = _fastest([*dict.fromkeys(candidates), None], run)
            _write(self._file, name, self._known[name])
        return self._known[name]


def _fitting(tile: Tile, n: int, k: int) -> Tile:
    """The tile, no larger than the weight."""
    columns, depth = triton.next_power_of_2(n), max(16, triton.next_power_of_2(k))
    return tile._replace(columns=min(tile.columns, max(16, columns)), depth=min(tile.depth, depth))


def _fastest(candidates: list[Tile | None], run: Callable[[Tile | None], object]) -> Tile | None:
    """Measured in a graph, as the host takes longer to start most of them than they run; behind something that fills
    the cache, so that weights come from memory."""
    times: dict[Tile | None, float] = {}
    other = torch.empty(1 << 27, dtype=torch.uint8, device="cuda")
    for tile in candidates:
        try:
            both = partial(lambda tile: (other.fill_(1), run(tile)), tile)
            times[tile] = triton.testing.do_bench_cudagraph(both, rep=5, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            continue  # more shared memory than this device has
    return min(times, key=times.__getitem__)


def _read(file: Path) -> dict[str, Tile | None]:
    if not file.exists():
        return {}
    try:
        read = json.loads(file.read_text())
        return {name: None if tile is None else Tile(*map(int, tile)) for name, tile in read.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no measured tiles ({error}); remove it, and they are measured again") from error


def _write(file: Path, name: str, tile: Tile | None) -> None:
    """Add one choice; another process may have added its own."""
    new = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(_read(file) | {name: tile}, indent=0))
        new.replace(file)
    except OSError as error:
        warnings.warn(f"{file} cannot be written ({error}): the next process measures again", stacklevel=3)
