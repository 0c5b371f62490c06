"""`RoutedCache`: row operations, memory, lengths, and what a decode step may not do."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from firstlab.model.cache import RoutedCache
from firstlab.model.routers import Routers
from firstlab.model.routes import PrunedRoutes, StepRoutes
from support.models import ARCHITECTURES, LAYERS, pair, prompts, random_routes
from support.reference import gated_logits, step_logits

every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
WINDOWED = ["mistral", "gemma2", "gemma3_text"]


def prefilled(model, routes=None, lengths=(5, 9, 12)):
    """(ids, mask, cache, logits of the last prompt token)."""
    ids, mask = prompts(lengths)
    cache = model.new_cache(routes=routes)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, past_key_values=cache)
    return ids, mask, cache, out.logits[:, -1]


def step(model, cache, tokens, mask):
    with torch.no_grad():
        return model(tokens, attention_mask=mask, past_key_values=cache).logits


def grown(mask, tokens=1):
    return torch.cat([mask, mask.new_ones(len(mask), tokens)], dim=1)


@every_architecture
def test_keys_and_values_of_layers_that_no_row_runs_are_freed(architecture):
    _, model = pair(architecture)
    _, mask, full, _ = prefilled(model, torch.ones(LAYERS, dtype=torch.bool))
    routes = torch.ones(3, LAYERS, dtype=torch.bool)
    routes[:, 0] = routes[:, 3] = False
    routes[0, 5] = routes[1, 5] = False
    _, _, cache, _ = prefilled(model, routes)
    sizes = [layer.keys.shape[-2] for layer in cache.layers]
    assert [size == 0 for size in sizes] == [True, False, False, True, False, False]
    own = [x.numel() * x.element_size() for layer in full.layers for x in (layer.keys, layer.values)]
    assert full.kv_bytes() == sum(own)
    assert cache.kv_bytes() == sum(own) - sum(own[0:2]) - sum(own[6:8])
    # Nothing of the freed storage is kept alive by a view.
    assert all(cache.layers[i].keys.untyped_storage().nbytes() == 0 for i in (0, 3))
    before = cache.kv_bytes()
    step(model, cache, torch.full((3, 1), 7), grown(mask))
    assert [layer.keys.shape[-2] == 0 for layer in cache.layers] == [True, False, False, True, False, False]
    assert cache.kv_bytes() >= before
    _, _, empty, _ = prefilled(model, torch.zeros(LAYERS, dtype=torch.bool))
    assert empty.kv_bytes() == 0


@every_architecture
def test_length_never_comes_from_a_skipped_layer(architecture):
    _, model = pair(architecture)
    _, mask, cache, _ = prefilled(model, torch.arange(LAYERS) > 1)
    assert cache.layers[0].keys.shape[-2] == 0
    for expected in (13, 14):
        mask = grown(mask)
        step(model, cache, torch.full((3, 1), 7), mask)
        assert cache.get_seq_length() == expected
        assert {cache.get_seq_length(i) for i in range(LAYERS)} == {expected}


@pytest.mark.parametrize("architecture", WINDOWED)
def test_windowed_masks_are_right_when_the_first_windowed_layer_is_skipped(architecture):
    base, model = pair(architecture)
    windowed = [i for i, layer in enumerate(prefilled(model)[2].layers) if layer.is_sliding]
    routes = torch.ones(3, LAYERS, dtype=torch.bool)
    routes[:, windowed[0]] = False
    ids, mask, cache, logits = prefilled(model, routes)
    found = [logits]
    for _ in range(12):
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        logits = step(model, cache, ids[:, -1:], grown(mask, ids.shape[1] - 12))[:, -1]
        found.append(logits)
    ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    torch.testing.assert_close(torch.stack(found, 1), step_logits(base, ids, mask, routes), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bloom"])
def test_several_tokens_at_once_after_the_prompt(architecture):
    base, model = pair(architecture)
    routes = random_routes(3)
    ids, mask, cache, _ = prefilled(model, routes)
    more = torch.randint(3, 97, (3, 5), generator=torch.Generator().manual_seed(0))
    logits = step(model, cache, more, grown(mask, 5))
    gates = routes[:, None].repeat(1, 17, 1)
    gates[:, :12] = True
    expected = gated_logits(base, torch.cat([ids, more], 1), grown(mask, 5), gates)[:, 12:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


ROWS = st.lists(st.integers(0, 2), min_size=1, max_size=6)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["llama", "gpt2", "gemma2"]), ROWS, st.integers(1, 3), ROWS)
def test_rows_keep_their_routes_and_keys_through_any_operations(architecture, selected, repeats, order):
    """Selecting, repeating and reordering rows gives the same next logits as starting with those rows."""
    _, model = pair(architecture)
    ids, mask, cache, _ = prefilled(model)
    rows = torch.arange(3)
    cache.batch_select_indices(torch.tensor(selected))
    rows = rows[selected]
    cache.batch_repeat_interleave(repeats)
    rows = rows.repeat_interleave(repeats)
    order = torch.tensor([i % len(rows) for i in order] + list(range(len(rows))))[: len(rows)]
    cache.reorder_cache(order)
    rows = rows[order]
    assert cache.get_seq_length() == 12
    fresh = model.new_cache()
    with torch.no_grad():
        model(ids[rows], attention_mask=mask[rows], past_key_values=fresh)
    assert torch.equal(cache.routes, fresh.routes)
    torch.testing.assert_close(cache.rho, fresh.rho, atol=1e-5, rtol=0)
    tokens = (rows + 5)[:, None]
    found = step(model, cache, tokens, grown(mask[rows]))
    torch.testing.assert_close(found, step(model, fresh, tokens, grown(mask[rows])), atol=1e-4, rtol=0)


def test_row_operations_on_forced_routes_have_no_rho():
    _, model = pair("llama")
    routes = random_routes(3)
    cache = prefilled(model, routes)[2]
    cache.reorder_cache(torch.tensor([2, 2, 0]))
    assert cache.rho is None
    assert torch.equal(cache.routes, routes[[2, 2, 0]])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda chunks: sum(chunks) <= 12))
def test_rho_is_the_same_for_every_way_to_cut_the_prompt(chunks):
    _, model = pair("gpt2")
    ids, mask = prompts()
    cuts = [0, *torch.tensor(chunks).cumsum(0).tolist()]
    cuts = [*cuts, 12] if cuts[-1] < 12 else cuts
    cache = model.new_cache(prompt_length=12)
    for start, end in zip(cuts, cuts[1:], strict=False):
        assert cache.routes is None
        out = step(model, cache, ids[:, start:end], mask[:, :end])
    torch.testing.assert_close(cache.rho, model.prompt_rho(ids, mask), atol=1e-5, rtol=0)
    whole = prefilled(model)
    torch.testing.assert_close(out[:, -1], whole[3], atol=1e-4, rtol=0)


def test_skip_rate():
    _, model = pair("llama")
    routes = torch.zeros(3, LAYERS, dtype=torch.bool)
    routes[1, :3] = True
    routes[2] = True
    cache = model.new_cache(routes=routes)
    with pytest.raises(ValueError, match="not known before the prompt has been read"):
        _ = cache.skip_rate
    torch.testing.assert_close(prefilled(model, routes)[2].skip_rate, torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_crop_takes_tokens_back_and_keeps_the_routes(architecture):
    _, model = pair(architecture)
    # Shorter than the window, where transformers can take tokens back.
    routes = torch.arange(LAYERS) > 0
    ids, mask = prompts((3, 4))
    cache = model.new_cache(routes=routes)
    step(model, cache, ids, mask)
    first = step(model, cache, torch.full((2, 1), 7), grown(mask))
    step(model, cache, torch.full((2, 1), 9), grown(mask, 2))
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    assert {cache.get_seq_length(i) for i in range(LAYERS)} == {4}
    assert cache.get_mask_sizes(1, 0) == (5, 0)
    torch.testing.assert_close(step(model, cache, torch.full((2, 1), 7), grown(mask)), first, atol=1e-5, rtol=0)


def test_reset_forgets_the_prompt_but_not_forced_routes():
    _, model = pair("llama")
    cache = prefilled(model)[2]
    cache.reset()
    assert cache.routes is None and cache.rho is None
    assert cache.get_seq_length() == 0 and cache.kv_bytes() == 0
    ids, mask = prompts((4, 7), seed=9)
    step(model, cache, ids, mask)
    assert torch.equal(cache.routes, model.route(ids, mask))
    routes = random_routes(3)
    cache = prefilled(model, routes)[2]
    cache.reset()
    ids, mask = prompts()
    step(model, cache, ids, mask)
    assert torch.equal(cache.routes, routes)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_cache_goes_its_own_way(duplicate):
    _, model = pair("llama")
    _, mask, cache, _ = prefilled(model)
    other = duplicate(cache)
    assert torch.equal(other.routes, cache.routes)
    a = step(model, cache, torch.full((3, 1), 7), grown(mask))
    assert (cache.get_seq_length(), other.get_seq_length()) == (13, 12)
    assert torch.equal(step(model, other, torch.full((3, 1), 7), grown(mask)), a)


def test_padding_that_holds_nan_never_reaches_rho():
    _, model = pair("llama")
    hidden = torch.randn(1, 4, 32)
    for chunks in ([4], [1, 3]):
        cache = model.new_cache(prompt_length=4)
        poisoned = hidden.clone()
        poisoned[0, 0] = float("nan")
        start = 0
        for size in chunks:
            mask = torch.ones(1, start + size)
            mask[0, 0] = 0
            cache.begin_pass(1, size, mask)
            cache._readings = [model.routers.readings(poisoned[:, start : start + size], layer) for layer in range(6)]
            cache._pool()
            start += size
        expected = torch.sigmoid(hidden[0, 1:] @ model.routers.weight.T).mean(0)
        torch.testing.assert_close(cache._sums[0] / cache._counts[0], expected)


def test_a_prompt_needs_a_two_dimensional_mask():
    _, model = pair("llama")
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model(torch.full((1, 3), 5), attention_mask=torch.zeros(1, 1, 3, 3), past_key_values=model.new_cache())


def test_forced_rows_must_divide_the_batch():
    _, model = pair("llama")
    with pytest.raises(ValueError, match="routes has 2 rows, which do not divide the batch of 3"):
        prefilled(model, random_routes(2))


@pytest.mark.parametrize("architecture", ["mamba", "jamba", "recurrent_gemma"])
def test_models_without_one_attention_cache_per_layer_are_refused(architecture):
    config = AutoConfig.for_model(architecture)
    count = config.num_hidden_layers
    with pytest.raises(ValueError, match="one attention cache per decoder layer"):
        RoutedCache(config, Routers(count, 8))


class CountHostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device, and copies between devices or dtypes."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"):
            self.reads += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral", "gemma2"])
def test_a_decode_step_reads_nothing_back_from_the_device(architecture):
    base, model = pair(architecture)
    routes = random_routes(3)
    _, mask, cache, _ = prefilled(model, routes)
    assert routes.any(0).any() and not routes.all(0).all()
    tokens = torch.full((3, 1), 7)
    dense = prefilled(model, torch.ones(LAYERS, dtype=torch.bool))[2]
    counts = []
    for each in (cache, dense):
        step(model, each, tokens, grown(mask))
        with CountHostReads() as counter:
            step(model, each, tokens, grown(mask, 2))
        counts.append(counter.reads)
    # What transformers itself reads (masks, say) is the same with and without skipping, and not per layer.
    assert counts[0] == counts[1] < LAYERS


def test_skipped_layers_compute_nothing():
    _, model = pair("llama")
    _, mask, cache, _ = prefilled(model, torch.tensor([True, False, False, True, False, True]))
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(model.lm.model.layers)
    ]
    step(model, cache, torch.full((3, 1), 7), grown(mask))
    for hook in hooks:
        hook.remove()
    assert calls == [0, 3, 5]


# -- a prompt whose beginning is cached --


def prefix_cached(model, prefix, **options):
    cache = model.new_cache(**options)
    with torch.no_grad():
        out = model(prefix, past_key_values=cache, prompt_continues=True)
    assert cache.routes is None and out.rho is None and not cache.decided
    return cache


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_a_cached_system_prompt_gives_the_routes_and_tokens_of_the_whole_prompt(architecture):
    _, model = pair(architecture)
    text, _ = prompts((17, 17, 17), seed=8)
    prefix = text[:1, :9]
    kept = prefix_cached(model, prefix)
    options = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    differing = set()
    for question, chunk in zip(text[:, 9:], (None, None, 3), strict=True):
        whole = torch.cat([prefix[0], question])[None]
        expected = model.generate(whole, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = model.generate(whole, past_key_values=copy.deepcopy(kept), prefill_chunk_size=chunk, **options)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.past_key_values.rho, expected.past_key_values.rho, atol=1e-6, rtol=0)
        assert torch.equal(found.past_key_values.routes, expected.past_key_values.routes)
        differing.add(tuple(found.past_key_values.routes[0].tolist()))
    # In some architectures these three questions get the same route.
    assert len(differing) > 1 or architecture in ("mixtral", "gpt_oss", "falcon")
    assert kept.get_seq_length() == 9 and not kept.decided


def test_a_cached_prefix_of_a_batch_in_several_passes_and_under_forced_routes():
    _, model = pair("llama")
    prefix, _ = prompts((8,), seed=8)
    rest, rest_mask = prompts((3, 6), seed=9)
    ids = torch.cat([prefix.expand(2, -1), rest], 1)
    mask = torch.cat([rest_mask.new_ones(2, 8), rest_mask], 1)
    schedule = StepRoutes(torch.tensor([[1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1]]).bool())
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 5, "return_dict_in_generate": True}
    for routes in (None, random_routes(2), schedule):
        kept = prefix_cached(model, prefix[:, :3])
        with torch.no_grad():
            model(prefix[:, 3:], past_key_values=kept, prompt_continues=True)
        with pytest.raises(ValueError, match=r"holds 1 rows and the batch has 2; repeat"):
            model.generate(ids, past_key_values=copy.deepcopy(kept), **options)
        kept.batch_repeat_interleave(2)
        found = model.generate(ids, past_key_values=kept, routes=routes, **options)
        expected = model.generate(ids, routes=routes, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.past_key_values.ran, expected.past_key_values.ran)


def test_what_cannot_go_on_is_refused():
    _, model = pair("llama")
    ids, _ = prompts((9,))
    kept = prefix_cached(model, ids[:, :5])
    with pytest.raises(ValueError, match="holds 5 tokens and input_ids has 5: give the whole text"):
        model.generate(ids[:, :5], past_key_values=kept)
    with pytest.raises(ValueError, match="cannot be taken back"):
        kept.crop(-1)
    with pytest.raises(ValueError, match="ran every layer, which PrunedRoutes forbid"):
        model.generate(ids, past_key_values=kept, routes=PrunedRoutes(torch.arange(LAYERS) > 0))
    with pytest.raises(ValueError, match="prompt_continues=True needs past_key_values"):
        model(ids, prompt_continues=True)
    with torch.no_grad():
        out = model(ids[:, 5:], past_key_values=kept)  # the last part decides
    assert torch.equal(kept.routes, model.route(ids)) and out.rho is not None
    with pytest.raises(ValueError, match="decided already; start a new cache"):
        model(ids, past_key_values=kept, prompt_continues=True)


def test_a_prompt_behind_a_decided_route_warns():
    _, model = pair("llama")
    text, _ = prompts((60,), seed=8)
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
    cache = model.new_cache()
    with torch.no_grad():
        model(text[:, :9], past_key_values=cache)  # as transformers caches a system prompt
    with pytest.warns(UserWarning, match=r"6 tokens come at once behind a route .* prompt_continues=True"):
        first = model.generate(text[:, :15], past_key_values=copy.deepcopy(cache), **options)
    with pytest.warns(UserWarning, match="33 tokens come at once"), torch.no_grad():
        model(text[:, 9:42], past_key_values=copy.deepcopy(cache))
    with warnings.catch_warnings():  # scoring a response, and a follow-up in a chat
        warnings.simplefilter("error")
        with torch.no_grad():
            model(text[:, 9:41], past_key_values=cache)
        turn = torch.cat([first.sequences, text[:, :20]], 1)
        model.generate(turn, past_key_values=first.past_key_values, **options)
