"""The engine's own prefill reads what the model reads: logits, routes, keys and values, whatever passes it takes."""

from typing import Any

import pytest
import torch

from firstlab.engine import prefill
from firstlab.engine.graph_step import GraphStep
from firstlab.engine.prefill import bucket_of, read_through_model
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.route_router import RouteRouter
from firstlab.model.routes import FixedRoutes, RoutersDecide, StepRoutes
from firstlab.model.settings import RouterSettings
from support.models import HIDDEN, LAYERS, random_routes, routed_model, tiny_model
from support.tape import Tape

LENGTHS = (9, 3, 40, 1, 17)


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def step_of(model: RouterAugmentedLM, kernels: bool = False) -> GraphStep:
    return GraphStep(model.lm, len(LENGTHS), 64, Tape(), kernels)


def same_as_the_model(step: GraphStep, model: RouterAugmentedLM, given: list[list[int]], rule: Any = None) -> None:
    found, wanted = step.read(given, model.routers, rule), read_through_model(model, given, rule)
    assert torch.equal(found.routes, wanted.routes)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    for place, route in enumerate(found.routes):
        for layer in route.nonzero().flatten().tolist():
            one, other = (each.keys_values(place, layer) for each in (found, wanted))
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_buckets() -> None:
    assert [bucket_of(n, 10**6) for n in (1, 16, 17, 33, 63, 65, 512, 513)] == [16, 16, 20, 40, 64, 80, 512, 640]
    assert bucket_of(30, 31) == 31
    windows = [64, 64, 80, 80, 96, 128, 160, 640, 640, 8192]
    assert [bucket_of(n, 10**6, 64) for n in (1, 64, 65, 80, 81, 128, 129, 545, 640, 8191)] == windows
    for length in range(1, 5000, 7):
        assert length <= bucket_of(length, 10**6, 64) < max(64, 1.25 * length) + 1


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
@torch.no_grad()
def test_replays_read_what_the_model_reads(architecture: str) -> None:
    model = routed_model(architecture)
    step = step_of(model)
    for seed in range(3):  # the first records, the others replay
        same_as_the_model(step, model, prompts(seed))
        assert len(step._graphs) == 1  # five prompts in one pass
    assert len({tuple(route) for route in step.read(prompts(0), model.routers, None).routes.tolist()}) > 1


@pytest.mark.parametrize(("norm", "reads"), [("none", 1), ("rms", 2)])  # the first records, the second replays
@torch.no_grad()
def test_routers_read_in_the_pass_of_the_norm(norm: str, reads: int) -> None:
    pytest.importorskip("triton")
    model = routed_model("qwen2")
    model.routers.settings = RouterSettings(input_norm=norm)
    step = step_of(model, kernels=True)
    assert step._prefill._reads_in_norm
    for seed in range(reads):
        same_as_the_model(step, model, prompts(seed))


@pytest.mark.parametrize("replayed", [0, 64, 1024])
@torch.no_grad()
def test_prompts_in_turn_and_in_chunks(replayed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MOST", 16)
    monkeypatch.setattr(prefill, "REPLAYED", replayed)
    model = routed_model()
    step = step_of(model)
    for seed in range(2):
        same_as_the_model(step, model, prompts(seed))
    # 40 tokens alone, 17 alone, 9 alone, 3 and 1 together; what is too long for a replay is read as it is.
    assert len(step._graphs) == {0: 0, 64: 4, 1024: 4}[replayed]


@pytest.mark.parametrize(
    "rule",
    [
        FixedRoutes(random_routes(len(LENGTHS))),
        FixedRoutes(random_routes(1)[0]),
        StepRoutes(torch.ones(2, LAYERS, dtype=torch.bool)),
        RoutersDecide(),
    ],
)
@torch.no_grad()
def test_routes_by_rule(rule: Any) -> None:
    model = routed_model()
    same_as_the_model(step_of(model), model, prompts(0), rule)


@torch.no_grad()
def test_routers_of_whole_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MOST", 32)  # one prompt in two chunks
    model = RouterAugmentedLM(tiny_model("llama"), RouterSettings(kind="routes"))
    router = model.routers
    assert isinstance(router, RouteRouter)
    generator = torch.Generator().manual_seed(0)
    features = len(router.length_weight)
    router.set_fit(
        codebook=torch.cat([torch.ones(1, LAYERS), random_routes(3).float()]),
        harm_weight=torch.randn(4, features, generator=generator),
        harm_bias=torch.zeros(4),
        rates=torch.tensor([0.0, 0.5]),
        prices=torch.tensor([0.0, 0.5]),
    )
    for rate in (None, 0.3, torch.linspace(0, 0.5, len(LENGTHS))):
        same_as_the_model(step_of(model), model, prompts(1), RoutersDecide(rate))


@torch.no_grad()
def test_other_routers_are_read_anew() -> None:
    model = routed_model()
    step = step_of(model)
    same_as_the_model(step, model, prompts(0))
    model.routers.weight.data = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(9))
    same_as_the_model(step, model, prompts(0))
    model.routers.weight.mul_(-1)  # in place: the replay sees it
    same_as_the_model(step, model, prompts(0))
    assert len(step._graphs) == 2
