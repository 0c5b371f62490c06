"""Losses of a set of prompts: in the order of the examples, whatever is kept and however rows stand in batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firstlab.config.build import build_data, load_model
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import EarlyExit, PrunedRoutes
from firstlab.model.teacher_forcing import TeacherForcedPass
from firstlab.training.prompt_set import PromptSet
from support.reference import without_layers
from support.tiny_run import composed, overrides

COUNT = 11


@pytest.fixture
def prompts(tiny_model_dir: Path, tmp_path: Path) -> PromptSet:
    config, _ = composed(*overrides(tiny_model_dir, tmp_path, "data=mini_mixture"))
    data = build_data(config)
    return PromptSet(load_model(config, tiny_model_dir), data, data.train[:COUNT], 4)


def alone(prompts: PromptSet, routes: Tensor) -> Tensor:
    """[N], the loss of each prompt in a pass of its own over prompt and response."""
    found = []
    for example, route in zip(prompts.examples, routes.expand(COUNT, -1), strict=True):
        [batch] = PromptSet(prompts.model, prompts.data, [example], 1).batches
        batch = {k: v for k, v in batch.items() if k != "index"}
        labels = batch["labels"].masked_fill(batch["prompt_mask"].bool(), -100)
        out = prompts.model(**{**batch, "labels": labels}, objective="decode_consistent", routes=route)
        found.append(out.loss.detach())
    return torch.stack(found)


def room_for(prompts: PromptSet, batches: float) -> int:
    """Bytes of the first so many of the batches that losses are measured in."""
    sizes = []
    for batch in prompts._by_length:
        reading = prompts.model.read_prompts(batch["input_ids"], batch["attention_mask"], batch["prompt_mask"])
        assert reading is not None
        sizes.append(reading.num_bytes)
    whole = int(batches)
    return int(sum(sizes[:whole]) + (batches - whole) * (sizes[whole] if whole < len(sizes) else 0))


@pytest.mark.parametrize("batches", [0, 1.5, 3])
def test_losses_are_those_of_each_prompt_alone(prompts: PromptSet, batches: float):
    prompts.cache_bytes = room_for(prompts, batches)
    layers = prompts.num_layers
    every = torch.ones(layers, dtype=torch.bool)
    mixed = torch.rand(COUNT, layers, generator=torch.Generator().manual_seed(0)) < 0.6
    for routes in (every, mixed, ~every, mixed):
        torch.testing.assert_close(prompts.losses(routes), alone(prompts, routes), atol=1e-5, rtol=1e-5)


def test_losses_without_layers_are_those_of_a_model_that_lacks_them(prompts: PromptSet):
    prompts.cache_bytes = room_for(prompts, 3)
    every = torch.ones(prompts.num_layers, dtype=torch.bool)
    dense = prompts.loss(every)  # keeps prompts as every layer reads them
    kept = every.clone()
    kept[[0, 2]] = False
    pruned = prompts.loss(PrunedRoutes(kept))
    assert prompts.loss(every) == dense
    smaller = without_layers(prompts.model.unwrap(), kept)
    losses, tokens = 0.0, 0
    for batch in prompts.batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            with torch.no_grad():
                logits = smaller(ids[None, mask.bool()]).logits[0, :-1]
            wanted = labels[mask.bool()][1:]
            losses += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            tokens += int((wanted != -100).sum())
    assert pruned == pytest.approx(losses / tokens, abs=1e-5)


def test_steps_count_as_far_as_generation_goes(prompts: PromptSet):
    # The first decode step runs every layer, later ones leave at the first.
    rule = EarlyExit(0.0, decay=1e3, horizon=1)
    whole = prompts.new_tokens()
    assert max(whole) > 5 and prompts.skip_rate(rule) > 0.3
    prompts.max_new_tokens = 5
    assert prompts.new_tokens() == [min(length, 5) for length in whole]
    shorter = [replace(example, max_new_tokens=3 + i % 4) for i, example in enumerate(prompts.examples)]
    limited = PromptSet(prompts.model, prompts.data, shorter, 4)
    limited.max_new_tokens = 5
    assert limited.new_tokens() == [min(length, 3 + i % 4, 5) for i, length in enumerate(whole)]
    prompts.max_new_tokens = 2
    assert prompts.skip_rate(rule) == 0


@pytest.mark.parametrize(("batches", "again"), [(0, 3), (1.5, 2), (3, 0)])
def test_what_there_is_room_for_is_read_once(
    prompts: PromptSet, batches: float, again: int, monkeypatch: pytest.MonkeyPatch
):
    prompts.cache_bytes = room_for(prompts, batches)
    seen = []
    read = RouterAugmentedLM.read_prompts
    monkeypatch.setattr(RouterAugmentedLM, "read_prompts", lambda *args: seen.append(args) or read(*args))
    routes = torch.ones(prompts.num_layers, dtype=torch.bool)
    prompts.loss(routes)
    assert len(seen) == 3  # 11 prompts, 4 at a time
    prompts.loss(routes)
    assert len(seen) == 3 + again


def test_neighbouring_routes_share_layers_and_lose_no_bit(prompts: PromptSet, monkeypatch: pytest.MonkeyPatch):
    every = torch.ones(prompts.num_layers, dtype=torch.bool)
    routes = [every, every & (torch.arange(prompts.num_layers) != 2), every & (torch.arange(prompts.num_layers) != 3)]
    alone = [prompts.loss(route) for route in routes]  # nothing is kept
    kept = prompts.take(COUNT)
    kept.cache_bytes = 2**30
    run, ran = TeacherForcedPass.run_layer, []

    def noted(self: Any, index: int, hidden: Tensor, run_it: Any, skip: Any) -> Any:
        return run(self, index, hidden, lambda: ran.append(index) or run_it(), skip)

    monkeypatch.setattr(TeacherForcedPass, "run_layer", noted)
    assert [kept.loss(route) for route in routes] == alone
    # Three batches; states are kept once all prompts are.
    assert ran == [*[0, 1, 2, 3] * 3, *[0, 1, 3] * 2, 3, *[2] * 3]


def test_losses_go_on_where_memory_runs_out(
    prompts: PromptSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    prompts.cache_bytes = 2**30
    routes = torch.tensor([[True, True, True, True], [True, False, True, True]])
    before, each = prompts.loss(routes[1]), prompts.losses_each(routes)
    respond = RouterAugmentedLM.respond

    def scarce(self: Any, reading: Any, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return respond(self, reading, labels, *args, **kwargs)

    monkeypatch.setattr(RouterAugmentedLM, "respond", scarce)
    again = prompts.take(COUNT)
    assert again.loss(routes[1]) == pytest.approx(before, rel=1e-5)
    assert (again.loss_batch_size, again.cache_bytes) == (2, 2**29) and again.batch_size == 4
    assert capsys.readouterr().err.splitlines() == ["warning: out of memory: going on with 2 rows in a pass"]
    torch.testing.assert_close(again.losses_each(routes), each)
