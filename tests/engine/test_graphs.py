"""Replays: one per key, and from fixed memory only; the tests' stand-in for them."""

import pytest
import torch

from firstlab.engine.graphs import Graphs
from support.tape import Tape


def test_one_replay_per_key() -> None:
    graphs, done = Graphs(torch.device("cpu")), []
    first = graphs("a", lambda: done.append(1))
    assert graphs("a", lambda: done.append(2)) is first and graphs("b", lambda: done.append(3)) is not first
    assert len(graphs) == 2 and done == []
    first()
    first()
    assert done == [1, 1]


def test_what_was_not_asked_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firstlab.engine.graphs.LIMIT", 10)
    graphs, done = Graphs(torch.device("cpu")), []
    first = graphs("a", lambda: done.append("a"), 4)
    graphs("b", lambda: done.append("b"), 4)
    assert graphs("a", lambda: None, 4) is first
    graphs("c", lambda: done.append("c"), 6)  # b goes
    assert len(graphs) == 2 and graphs("a", lambda: None, 4) is first
    again = graphs("b", lambda: done.append("new"), 12)  # larger than all may be
    again()
    first()  # whoever holds one may go on
    assert len(graphs) == 1 and done == ["new", "a"]


def replays_read_memory(graphs: Graphs, device: str) -> None:
    x, y = torch.ones(3, device=device), torch.zeros(3, device=device)
    state = {"factor": 2.0}
    replay = graphs("double", lambda: y.add_(x * state["factor"]).sub_(0))
    replay()  # the body itself
    x.fill_(5)
    state["factor"] = 100.0  # Python is not asked again
    replay()
    assert y.tolist() == [12, 12, 12]
    replay()
    assert y.tolist() == [22, 22, 22]


def test_the_tape_replays_memory() -> None:
    replays_read_memory(Tape(), "cpu")


def test_the_tape_refuses_to_wait_for_the_device() -> None:
    x = torch.ones(3)
    for body in (lambda: x.fill_(x[0].item()), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x[0])):
        with pytest.raises(AssertionError, match="inside a graph"):
            Tape()("body", body)()


@pytest.mark.gpu
def test_cuda_graphs_replay_memory() -> None:
    replays_read_memory(Graphs(torch.device("cuda")), "cuda")


@pytest.mark.gpu
def test_cuda_graphs_in_any_order() -> None:
    graphs, x = Graphs(torch.device("cuda")), torch.zeros(4, device="cuda")
    steps = {key: graphs(key, lambda key=key: x.mul_(2).add_(torch.full_like(x, key))) for key in (1, 3)}
    expected = 0
    for key in (1, 3, 1, 1, 3, 3, 1):
        steps[key]()
        expected = 2 * expected + key
    assert x.tolist() == [expected] * 4
