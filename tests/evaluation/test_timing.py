"""The stopwatch: seconds since its start, by the host's clock or the GPU's."""

import time

import pytest
import torch

from firstlab.evaluation.timing import Stopwatch


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_times_since_the_start(device: str) -> None:
    scores = torch.zeros(1, 5, device=device)
    watch, began = Stopwatch(torch.device(device)), time.perf_counter()
    for _ in range(2):
        time.sleep(0.02)
        assert watch(torch.zeros(1, 1, dtype=torch.long), scores) is scores
    first, second = watch.times
    assert 0.02 <= first < first + 0.02 <= second <= time.perf_counter() - began + 0.005


@pytest.mark.gpu
def test_a_gpu_notes_its_own_time() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    (x @ x).sum().item()
    watch, began = Stopwatch(torch.device("cuda")), time.perf_counter()
    for _ in range(200):
        x = x @ x / 4096
    watch(x, x)
    host = time.perf_counter() - began  # the products have been asked for, not made
    assert watch.times[0] > 2 * host


def test_what_is_on_the_host() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.note()
    watch.note()
    assert 0 <= watch.times[0] <= watch.times[1] < 1
