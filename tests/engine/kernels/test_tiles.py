"""How a product runs is measured once per device and shape, and kept."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from firstlab.engine.kernels import tiles
from firstlab.engine.kernels.tiles import Tile, Tiles

SHAPE = (4096, 1024)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Tile | None]:
    """What a pretended GPU runs; Tile(4, 1024, 2) does not fit it, and Tile(4, 2048) is the fastest of one row."""
    runs: list[Tile | None] = []

    def bench(run, **_: object) -> float:
        run()
        if runs[-1] == Tile(4, 1024, 2):
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        return 1.0 if runs[-1] == Tile(8, 512) else 2.0 if runs[-1] is None else 3.0

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", bench)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device, **kind: empty(1, **kind))
    return runs


def test_the_fastest_way_is_kept(measured: list[Tile | None], tmp_path: Path) -> None:
    file, cuda = tmp_path / "new" / "tiles.json", torch.device("cuda")
    for _ in range(2):  # the second reads what the first has written
        each = Tiles(cuda, file)
        for _ in range(2):
            assert each("product", 1, SHAPE, torch.float16, measured.append) == Tile(8, 512)
            assert each("product", 4, SHAPE, torch.float16, measured.append) is None  # the library
            assert each("product", 16, SHAPE, torch.float16, measured.append) is None  # as good as 4
    assert measured.count(None) == 2 and len(set(measured)) == len(measured) - 1
    names = ["Pretended product 1 4096 1024 float16", "Pretended product 16 4096 1024 float16"]
    assert json.loads(file.read_text()) == {names[0]: [8, 512, 4, 3], names[1]: None}
    assert [path.name for path in file.parent.iterdir()] == ["tiles.json"]


def test_what_needs_no_measuring(measured: list[Tile | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiles.KNOWN, "Pretended product 1 4096 1024 float16", Tile(2, 64))
    each = Tiles(torch.device("cuda"), tmp_path / "tiles.json")
    assert each("product", 1, SHAPE, torch.float16, measured.append) == Tile(2, 64)
    assert each("product", 33, SHAPE, torch.float16, measured.append) is None
    for rows in (1, 8):
        small = each("product", rows, (40, 20), torch.float16, measured.append)
        assert small is not None and small.columns <= 64 and small.depth == 32
    on_cpu = Tiles(torch.device("cpu"), tmp_path / "tiles.json")
    assert on_cpu("product", 1, SHAPE, torch.float16, measured.append) == Tile(256, 256)
    assert measured == [] and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(measured: list[Tile | None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    each = Tiles(torch.device("cuda"), tmp_path / "file" / "tiles.json")
    with pytest.warns(UserWarning, match="cannot be written"):
        assert each("product", 1, SHAPE, torch.float16, measured.append) == Tile(8, 512)


@pytest.mark.parametrize("text", ["", "[1]", '{"a": 3}', '{"a": [1]}', '{"a": ["b", 1]}'])
def test_a_damaged_file_is_named(measured: list[Tile | None], tmp_path: Path, text: str) -> None:
    file = tmp_path / "tiles.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="tiles.json holds no measured tiles"):
        Tiles(torch.device("cuda"), file)


@pytest.mark.gpu
def test_gpu_measures_in_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from firstlab.engine.kernels.product import product

    monkeypatch.setattr(tiles, "_ONE_ROW", tiles._ONE_ROW[:2])
    x, weight = (torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16) for rows in (1, 4096))

    def run(tile: Tile | None) -> torch.Tensor:
        out = x.new_empty(1, 4096)
        if tile is None:
            return torch.mm(x, weight.t(), out=out)
        product(x, weight, None, None, None, 0.0, False, out, list(tile))
        return out

    chosen = Tiles(x.device, tmp_path / "tiles.json")("product", 1, SHAPE, x.dtype, run)
    assert chosen in (*tiles._ONE_ROW, None) and len(json.loads((tmp_path / "tiles.json").read_text())) == 1
    torch.testing.assert_close(run(chosen), run(None), atol=0.5, rtol=0.05)
