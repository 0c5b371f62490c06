"""The step from replays: what it makes, when, and that it reads its buffers only."""

from collections.abc import Callable
from weakref import ref

import pytest
import torch

from firstlab.engine import graph_step
from firstlab.engine.graph_step import GraphStep, runs_of, size_of
from firstlab.engine.graphs import Graphs
from firstlab.engine.llama_step import LlamaStep
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import EarlyExit
from support.models import ARCHITECTURES, HIDDEN, LAYERS, tiny_model
from support.tape import Tape

HEADS, DIM = 2, 8  # of keys and values


def test_sizes() -> None:
    assert [size_of(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_runs() -> None:
    assert runs_of([]) == [] and runs_of([3]) == [[3]]
    assert runs_of([0, 1, 2, 4, 6, 7]) == [[0, 1, 2], [4], [6, 7]]


def joined(step: LlamaStep, routes: list[list[int]], lengths: list[int], seed: int = 0) -> LlamaStep:
    """The step with rows of random keys and values."""
    generator = torch.Generator().manual_seed(seed)
    for route, length in zip(routes, lengths, strict=True):
        shape = (2, HEADS, length, DIM)
        step.join({layer: torch.randn(shape, generator=generator) for layer in route}, length)
    return step


EVERY = list(range(LAYERS))


@pytest.mark.parametrize(
    ("routes", "lengths"),
    [
        ([EVERY], [5]),
        ([[0, 2, 5]], [62]),
        ([EVERY, EVERY, EVERY], [3, 70, 9]),
        ([[0, 1, 3], [0, 3, 4, 5], [1, 3], [], [3, 5]], [3, 61, 9, 1, 30]),
    ],
)
def test_logits_of_the_eager_step(routes: list[list[int]], lengths: list[int]) -> None:
    lm = tiny_model("llama")
    tape = Tape()
    eager, graphs = LlamaStep(lm, 6, 100), GraphStep(lm, 6, 100, tape)
    for seed in (0, 1):  # the second round replays
        for step in (eager, graphs):
            step.clear()
            joined(step, routes, lengths, seed)
        for token in range(6):
            tokens = torch.arange(len(routes)) + 10 + token
            torch.testing.assert_close(graphs(tokens), eager(tokens), atol=1e-4, rtol=1e-4)
        made = len(tape)
    assert len(tape) == made and tape.played > made
    # Leaving gives places to others.
    for step in (eager, graphs):
        step.leave(0)
    if len(routes) > 1:
        torch.testing.assert_close(graphs(tokens[1:]), eager(tokens[1:]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "library"),
    [("llama", False), ("qwen2", False), ("qwen3", False), ("phi3", False), ("qwen2", True)],
)
def test_logits_through_kernels(architecture: str, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if library:  # what products of many rows go through
        monkeypatch.setattr("firstlab.engine.kernels.tiles.MOST_ROWS", 0)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # where kernels are interpreted
    lm, tape = tiny_model(architecture).to(device), Tape()
    for name, parameter in lm.named_parameters():
        if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):  # all zeros or ones in a fresh model
            torch.nn.init.uniform_(parameter, 0.5, 2)
    eager, kernels = LlamaStep(lm, 3, 80), GraphStep(lm, 3, 80, tape, kernels=True)
    assert kernels._fused is not None and not kernels._mask.numel()
    for routes, lengths in (([[0, 1, 2]], [63]), ([[0, 1], [], [1, 2]], [70, 9, 3])):
        for step in (eager, kernels):
            step.clear()
            joined(step, routes, lengths)
        for token in range(2):  # the second is a replay, though attention sees more places
            tokens, made = torch.arange(len(routes), device=device) + 10 + token, len(tape)
            torch.testing.assert_close(kernels(tokens), eager(tokens), atol=1e-4, rtol=1e-4)
        assert len(tape) == made


def test_kernels_are_for_silu_and_plain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setitem(ARCHITECTURES["llama"], "hidden_act", "gelu")
    assert GraphStep(tiny_model("llama"), 1, 64, Tape(), kernels=True)._fused is None


def test_any_route_is_at_most_one_run_more_than_skipped_layers() -> None:
    tape = Tape()
    step = GraphStep(tiny_model("llama"), 1, 64, tape)
    addresses = [buffer.data_ptr() for buffer in (step._x, step._scores, step._mask, step._filled)]
    joined(step, [EVERY], [5])
    step(torch.tensor([7]))
    assert len(tape) == 1 + 2
    known = {tuple(EVERY)}
    for seed in range(5):
        route = (torch.rand(LAYERS, generator=torch.Generator().manual_seed(seed)) > 0.4).nonzero().flatten().tolist()
        step.clear()
        joined(step, [route], [5 + seed])
        before, kept = tape.played, [None if kv is None else kv.clone() for kv in step.kv]
        step(torch.tensor([8 + seed]))
        runs = set(map(tuple, runs_of(route)))
        assert tape.played - before == len(runs) + 2 <= LAYERS - len(route) + 3
        known |= runs
        assert len(tape) == len(known) + 2  # routes share runs
        for layer, (old, new) in enumerate(zip(kept, step.kv, strict=True)):
            assert torch.equal(old, new) == (layer not in route)  # skipped layers are not written
    assert addresses == [buffer.data_ptr() for buffer in (step._x, step._scores, step._mask, step._filled)]


@pytest.mark.parametrize("routes", [[[0, 2, 3, 5]], [[0, 1, 3], EVERY, [1, 3]]])
def test_what_is_run_often_becomes_one_replay(routes: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "OFTEN", 3)
    monkeypatch.setattr(graph_step, "_COUNTED", 1)
    tape, lm = Tape(), tiny_model("llama")
    eager, graphs = LlamaStep(lm, 4, 100), GraphStep(lm, 4, 100, tape)
    each = len(runs_of(sorted({layer for route in routes for layer in route}))) + 2
    for turn in range(3):
        for step in (eager, graphs):
            step.clear()
            joined(step, routes, [5, 7, 9][: len(routes)], turn)
        played = []
        for token in range(5):
            tokens, before = torch.arange(len(routes)) + token, tape.played
            torch.testing.assert_close(graphs(tokens), eager(tokens), atol=1e-4, rtol=1e-4)
            played.append(tape.played - before)
        assert played == ([each] * 3 + [1] * 2 if turn != 1 else [1] * 5)
        if turn == 1:  # a whole that the graphs forget is run in parts again, until it has been run often
            [whole] = [key for key in tape._replays if isinstance(key[0], tuple)]
            del tape._replays[whole]
    assert len(graphs._taken) <= 2
    for step in (eager, graphs):  # another plan for the same size
        step.leave(0)
        joined(step, [[0, 5]], [20])
    torch.testing.assert_close(graphs(tokens), eager(tokens), atol=1e-4, rtol=1e-4)


def test_graphs_grow_with_sizes_and_windows_only() -> None:
    tape = Tape()
    step = joined(GraphStep(tiny_model("llama"), 8, 200, tape), [EVERY] * 3, [60, 20, 3])
    tokens, made = torch.tensor([5, 6, 7]), []
    for _ in range(40):
        step(tokens)
        made.append(len(tape))
    # Windows of 64, 80, 96 and 112 places, each with its begin; one end.
    assert sorted(set(made)) == [windows * 2 + 1 for windows in (1, 2, 3, 4)]
    joined(step, [EVERY], [10])
    step(torch.tensor([5, 6, 7, 8]))  # the size of four rows stands for three
    assert len(tape) == made[-1]


def test_a_step_that_nobody_needs_is_gone() -> None:
    class Captured(Graphs):
        """Forgets what it captured, as on a GPU."""

        def make(self, body: Callable[[], None]) -> Callable[[], None]:
            bodies = [body]
            return lambda: bodies.pop()()

    model = RouterAugmentedLM(tiny_model("llama"))
    step = joined(GraphStep(model.lm, 2, 64, Captured(torch.device("cpu"))), [EVERY], [4])
    step.read([[5, 6, 7]], model.routers, None)
    step(torch.tensor([5]))
    gone = ref(step)
    del step
    assert gone() is None  # at once: nothing waits for the garbage collector with keys, values and graphs


def test_early_exit_between_steps() -> None:
    lm = tiny_model("llama")
    steps = [joined(each, [EVERY] * 2, [4, 9]) for each in (LlamaStep(lm, 2, 64), GraphStep(lm, 2, 64, Tape()))]
    tokens, at = torch.tensor([5, 6]), torch.zeros(2, dtype=torch.long)
    found = [(step(tokens).clone(), *step.exit_early(tokens, EarlyExit(0.3), at), step(tokens)) for step in steps]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_replaced_weights_are_noticed() -> None:
    lm = tiny_model("llama")
    step = GraphStep(lm, 1, 16, Tape())
    assert step.is_current()
    with torch.no_grad():
        lm.model.layers[0].self_attn.o_proj.weight.mul_(2)  # in place: graphs see it
    assert step.is_current()
    lm.model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(torch.zeros(HIDDEN, HIDDEN))
    assert not step.is_current()
