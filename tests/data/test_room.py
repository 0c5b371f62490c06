"""Passes get smaller where memory runs out, and every row is read once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from firstlab.data.room import Room


def test_passes_are_halved_until_they_fit_and_stay_so(capsys: pytest.CaptureFixture[str]):
    room, tried = Room(), []

    def read(rows: Sequence[int]) -> list[int]:
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(rows)

    assert list(room.passes(range(2), read)) == [[0, 1]]
    assert sum(room.passes(range(10), read), []) == list(range(10))
    assert sum(room.passes(range(10, 15), read), []) == list(range(10, 15))
    assert tried == [2, 10, 5, 2, 2, 2, 2, 2, 2, 2, 1]
    assert capsys.readouterr().err.splitlines() == [
        "warning: out of memory: going on with 5 rows in a pass",
        "warning: out of memory: going on with 2 rows in a pass",
    ]


def test_a_row_that_does_not_fit_is_an_error():
    def read(rows: Sequence[int]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        list(Room().passes(range(4), read))
