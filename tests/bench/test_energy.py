"""Energy counters on a made folder."""

from pathlib import Path

import torch

from firstlab.bench.energy import joules_counter


def package(folder: Path, name: str, energy: int, limit: int) -> Path:
    (folder / name).mkdir()
    (folder / name / "energy_uj").write_text(f"{energy}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")
    return folder / name / "energy_uj"


def test_packages_add_up_and_wrap(tmp_path: Path) -> None:
    first = package(tmp_path, "intel-rapl:0", 900_000, 999_999)
    second = package(tmp_path, "intel-rapl:1", 0, 999_999)
    part = package(tmp_path, "intel-rapl:0:0", 5, 999_999)
    counter = joules_counter(torch.device("cpu"), tmp_path)
    assert counter is not None and counter() == 0
    first.write_text("400000")  # went over its range once
    second.write_text("250000")
    part.write_text("900000")  # within its package
    assert counter() == 0.75
    first.write_text("500000")
    assert counter() == 0.85


def test_no_counters(tmp_path: Path) -> None:
    assert joules_counter(torch.device("cpu"), tmp_path / "missing") is None
    package(tmp_path, "intel-rapl:0", 0, 10).unlink()
    assert joules_counter(torch.device("cpu"), tmp_path) is None
