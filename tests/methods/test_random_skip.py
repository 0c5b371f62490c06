"""Random skip: the right number of unprotected layers, drawn from the seed and, by prompt, from the prompt alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from firstlab.methods.random_skip import RandomSkip
from support.fake_prompts import FakePrompts, skipped
from support.tiny_run import composed


@given(
    layers=st.integers(4, 40),
    rate=st.floats(0.15, 0.5),
    seed=st.integers(0, 1000),
    first=st.integers(0, 1),
    last=st.integers(0, 1),
    draw=st.sampled_from(["run", "prompt"]),
)
def test_k_unprotected_layers_are_skipped(layers: int, rate: float, seed: int, first: int, last: int, draw: str):
    method = RandomSkip(rate, first, last, seed, draw)
    routes = method.routes(FakePrompts(layers))
    assert routes.shape == ((layers,) if draw == "run" else (3, layers))
    for row in routes.view(-1, layers):
        assert len(skipped(row)) == round(rate * layers)
        assert set(skipped(row)) <= set(range(first, layers - last))


def test_every_layer_is_drawn_equally_often():
    draws = torch.stack([RandomSkip(0.25, 1, 1, seed).routes(FakePrompts(10)) for seed in range(2000)])
    rates = 1 - draws.float().mean(0)
    assert rates[0] == rates[-1] == 0
    torch.testing.assert_close(rates[1:-1], torch.full([8], 2 / 8), atol=0.04, rtol=0)


def test_a_prompts_draw_depends_on_seed_and_prompt_only():
    method = RandomSkip(0.3, draw="prompt", seed=4)
    texts = [f"prompt {i}" for i in range(40)]
    together = method.routes(FakePrompts(16, texts))
    backwards = method.routes(FakePrompts(16, texts[::-1]))
    assert torch.equal(together, backwards.flip(0))
    for text, row in zip(texts, together, strict=True):
        assert torch.equal(method.routes(FakePrompts(16, [text]))[0], row)
    assert len(together.unique(dim=0)) > 30
    assert not torch.equal(together, RandomSkip(0.3, draw="prompt", seed=5).routes(FakePrompts(16, texts)))


def test_draws_are_the_same_on_every_machine():
    assert skipped(RandomSkip(0.25, seed=0).routes(FakePrompts(16))) == [2, 5, 6, 14]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw": "token"}, "method.draw='token': choose one of run, prompt"),
        ({"protect_first": -1}, "method.protect_first=-1"),
    ],
)
def test_wrong_settings_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RandomSkip(**options)


def test_a_rate_is_needed():
    with pytest.raises(ValueError, match="method.target_skip=None is not allowed: it takes a finite number"):
        composed("method=random_skip", "method.target_skip=null")


def test_too_few_unprotected_layers():
    with pytest.raises(ValueError, match="cannot skip 4 of 5 layers while the first 1 and the last 1 are kept"):
        RandomSkip(0.8).routes(FakePrompts(5))
