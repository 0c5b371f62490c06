"""`RouteRouter`: the rule against a reference, and one decision however a prompt comes in."""

from __future__ import annotations

from itertools import pairwise
from operator import mul

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.engine.engine import DecodeEngine
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.route_router import RouteRouter, read_layers
from firstlab.model.routes import RoutersDecide
from firstlab.model.settings import RouterSettings
from support.models import HIDDEN, LAYERS, SETS, filled, pair, prompts, routed


def reference_means(model: RouterAugmentedLM, ids: torch.Tensor) -> torch.Tensor:
    """[F] of one prompt [1, T] without padding, from transformers' own hidden states."""
    states = model.unwrap()(input_ids=ids, output_hidden_states=True).hidden_states
    parts = []
    for layer in read_layers(LAYERS):
        hidden = states[layer].float()
        parts.append((hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()).mean(1))
    return torch.cat(parts, 1)[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "phi3"])
def test_means_are_those_of_the_unskipped_states(architecture):
    model = routed(architecture)
    ids, mask = prompts((5, 9, 12))
    with torch.no_grad():
        means = model.prompt_means(ids, mask)
        expected = [
            reference_means(routed(architecture), row[real.bool()][None]) for row, real in zip(ids, mask, strict=True)
        ]
    torch.testing.assert_close(means, torch.stack(expected), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000), st.sampled_from(["length", "tokens", "size"]), st.floats(0, 0.5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_rule_is_the_cheapest_allowed_route(seed, price, rate, floor):
    router = RouteRouter(LAYERS, HIDDEN, RouterSettings(kind="routes", price=price, max_harm=0.15 if floor else None))
    filled(router, seed)
    means = torch.randn(7, router.harm_weight.shape[1])
    chosen = router.choose(means, rate)
    skips = [len(each) / LAYERS for each in SETS]
    weights, biases = router.harm_weight.tolist(), router.harm_bias.tolist()
    for row, choice in zip(means.tolist(), chosen.tolist(), strict=True):
        harms = [sum(map(mul, w, row)) + c for w, c in zip(weights, biases, strict=True)]
        allowed = [k for k in range(len(SETS)) if k == 0 or not floor or harms[k] <= 0.15]
        if price == "size":
            near = min(abs(skip - rate) for skip in skips)
            allowed = [k for k in allowed if abs(abs(skips[k] - rate) - near) < 1e-5] or [0]
            costs = {k: harms[k] for k in allowed}
        elif torch.tensor(rate) == 0:
            allowed, costs = [0], {0: 0.0}
        else:
            length = 1.0
            if price == "length":
                length = 2.718281828 ** (sum(map(mul, router.length_weight.tolist(), row)) + 1)
            table = [(0, 0), (0.1, 0.05), (0.3, 0.2), (0.5, 1.0)]
            (r0, p0), (r1, p1) = next(pair for pair in pairwise(table) if pair[0][0] <= rate <= pair[1][0])
            mu = p0 + (p1 - p0) * (rate - r0) / (r1 - r0)
            costs = {k: harms[k] - mu * length * skips[k] for k in allowed}
        assert costs[choice] <= min(costs.values()) + 1e-3


def test_one_decision_under_padding_batching_chunks_beams_and_the_engine():
    model = routed()
    ids, mask = prompts((5, 9, 12, 7))
    rates = torch.tensor([0.05, 0.15, 0.3, 0.5])
    with torch.no_grad():
        batch = model.route(ids, mask, rates)
        assert len(batch.unique(dim=0)) > 2
        for row in range(len(ids)):
            alone = ids[row][mask[row].bool()][None]
            assert torch.equal(model.route(alone, skip_rate=float(rates[row]))[0], batch[row])
        cache = model.new_cache(prompt_length=ids.shape[1], routes=RoutersDecide(rates))
        model(ids[:, :5], mask[:, :5], past_key_values=cache)
        model(ids[:, 5:], mask, past_key_values=cache)
        assert torch.equal(cache.routes, batch)
    out = model.generate(
        ids, mask, skip_rate=rates, num_beams=2, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert torch.equal(out.past_key_values.routes[::2], batch)
    greedy = model.generate(ids, mask, skip_rate=rates, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(
        greedy, model.generate(ids, mask, routes=batch, max_new_tokens=6, do_sample=False, eos_token_id=None)
    )
    texts = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    engine = DecodeEngine(model, 32, 4).generate(texts, 6, skip_rate=rates, eos=())
    assert torch.equal(engine.routes, batch)
    assert [row[-6:].tolist() for row in greedy] == engine.tokens


def test_a_teacher_forced_pass_follows_the_decision():
    model = routed()
    ids, mask = prompts((8, 8))
    labels = ids.clone()
    labels[:, :5] = -100
    prompt = (labels == -100).long()
    with torch.no_grad():
        routes = model.route(ids, prompt, 0.3)
        free = model(ids, mask, labels, objective="decode_consistent", routes=RoutersDecide(0.3), keep_logits=False)
        forced = model(ids, mask, labels, objective="decode_consistent", routes=routes, keep_logits=False)
    assert torch.equal(free.rho, routes.float())
    torch.testing.assert_close(free.token_losses, forced.token_losses)


def test_a_rate_of_0_is_dense_decoding():
    ids, mask = prompts((5, 9, 12))
    model = routed()
    assert not model.route(ids, mask, skip_rate=1e-6).all()  # routes that promise to help
    assert model.route(ids, mask, skip_rate=0).all()
    mixed = model.route(ids, mask, skip_rate=torch.tensor([0, 0.5, 0.0]))
    assert mixed.all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("rate", [-0.1, 0.51, float("nan"), [0.1, 0.2, 0.3], "0.2"])
def test_rates_out_of_range_are_refused_with_the_range(rate):
    ids, mask = prompts((5, 9))
    rate = torch.tensor(rate) if isinstance(rate, list) else rate
    with pytest.raises(ValueError, match="skip_rate"):
        routed().generate(ids, mask, skip_rate=rate, max_new_tokens=2)
    _, layers = pair("llama")
    with pytest.raises(ValueError, match="router.kind=routes"):
        layers.generate(ids, mask, skip_rate=0.2, max_new_tokens=2)


def test_it_is_saved_and_loaded_and_a_damaged_file_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    model = routed(max_harm=0.5)
    ids, mask = prompts((5, 9, 12))
    model.lm.config._name_or_path = "somewhere"
    model.save_pretrained(tmp_path, save_base=True)
    again = RouterAugmentedLM.from_pretrained(tmp_path)
    assert again.routers.settings == model.routers.settings
    assert torch.equal(again.route(ids, mask, 0.3), model.route(ids, mask, 0.3))
    half = again.to(torch.bfloat16)
    assert {value.dtype for value in half.routers.state_dict().values()} == {torch.float32}
    file = tmp_path / "routers.safetensors"
    for change in ({"codebook": torch.full((2, LAYERS), 0.5)}, {"rates": torch.tensor([1.0, 0.0])}, {"prices": None}):
        damaged = {**load_file(file), **{k: v for k, v in change.items() if v is not None}}
        damaged = {k: v for k, v in damaged.items() if change.get(k, 0) is not None}
        save_file(damaged, tmp_path / "routers.safetensors")
        with pytest.raises(ValueError, match="routers.safetensors"):
            RouterAugmentedLM.from_pretrained(tmp_path)
        model.save_pretrained(tmp_path, save_base=True)
