"""`StepRoutes`, `EarlyExit` and `PrunedRoutes` against slow references, in cached decoding and teacher-forced."""

from __future__ import annotations

import copy
from functools import cache as once

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import (
    EarlyExit,
    FixedRoutes,
    PrunedRoutes,
    StepRoutes,
    decode_steps,
    layer_skips,
    routes_from_json,
)
from support.models import (
    ARCHITECTURES,
    LAYERS,
    pair,
    prompts,
    random_lora,
    random_routes,
    routed_model,
    tiny_model,
    with_logits,
)
from support.reference import decoder_layers, slow_early_exit, slow_scheduled, without_layers

SOME = ["llama", "gpt2", "gemma2", "mistral", "bloom", "opt", "gptj", "mixtral"]
some_architectures = pytest.mark.parametrize("architecture", SOME)
# Layer 0 goes first, layer 1 last; two steps share the third set.
SCHEDULE = StepRoutes(
    torch.tensor(
        [[1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0]]
    ).bool()
)


def decode(model, ids, mask, routes, new_tokens=8, **options):
    return with_logits(model, ids, mask, routes=routes, max_new_tokens=new_tokens, eos_token_id=None, **options)


def teacher_forced(model, sequences, mask, routes):
    full = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], dim=1)
    prompt_mask = full.clone()
    prompt_mask[:, mask.shape[1] :] = 0
    with torch.no_grad():
        return model(sequences, full, prompt_mask=prompt_mask, objective="decode_consistent", routes=routes)


def exit_rule(model, confidence, **options):
    """A rule that skips about a third of this model's layers on random text."""
    ids, mask = prompts((16, 16, 16, 16), seed=8)
    low, high = 0.0, 1.0
    for _ in range(12):
        rule = EarlyExit((low + high) / 2, confidence, **options)
        skipped = 1 - teacher_forced(model, ids, mask[:, :4], rule).ran[:, 4:].float().mean()
        low, high = (rule.threshold, high) if skipped > 0.35 else (low, rule.threshold)
    return rule


# -- schedules --


@some_architectures
def test_scheduled_decoding_equals_the_slow_reference_and_the_teacher_forced_pass(architecture):
    base, model = pair(architecture)
    ids, mask = prompts()
    expected, expected_logits = slow_scheduled(base, ids, mask, SCHEDULE.schedule, 8)
    sequences, logits, cache = decode(model, ids, mask, SCHEDULE)
    assert torch.equal(sequences, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    out = teacher_forced(model, sequences, mask, SCHEDULE)
    torch.testing.assert_close(out.logits[:, 11:-1], expected_logits, atol=1e-4, rtol=0)
    ran = SCHEDULE.schedule[[0, 1, 2, 3, 4, 4, 4]]
    assert torch.equal(cache.ran, ran.expand(3, -1, -1))
    assert torch.equal(out.ran[:, 12:19], cache.ran) and out.ran[:, :12].all()
    torch.testing.assert_close(cache.layer_skips(), 1 - ran.float().mean(0).expand(3, -1))
    torch.testing.assert_close(cache.skip_rate, (1 - ran.float().mean()).expand(3))
    first = cache.layer_skips(torch.tensor([0, 1, 3]))
    torch.testing.assert_close(first, torch.tensor([[0.0] * 6, [0, 0, 0, 1, 0, 0], [2 / 3, 0, 1 / 3, 1, 0, 0]]))


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 5}, {"side": "right"}], ids=["chunked", "right-padded"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["schedule", "exit"])
def test_chunks_padding_side_and_neighbours_change_nothing(architecture, options, kind):
    _, model = pair(architecture)
    routes = SCHEDULE if kind == "schedule" else exit_rule(model, "softmax")
    options = dict(options)
    plain, logits, cache = decode(model, *prompts(), routes)
    other, other_logits, other_cache = decode(model, *prompts(side=options.pop("side", "left")), routes, **options)
    assert torch.equal(plain, other) and torch.equal(cache.ran, other_cache.ran)
    torch.testing.assert_close(logits, other_logits, atol=1e-4, rtol=0)
    ids, mask = prompts()
    alone, alone_logits, alone_cache = decode(model, ids[:1, -5:], mask[:1, -5:], routes)
    assert torch.equal(alone[0, 5:], plain[0, 12:]) and torch.equal(alone_cache.ran[0], cache.ran[0])
    torch.testing.assert_close(alone_logits[0], logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "bloom"])
@pytest.mark.parametrize("kind", ["schedule", "exit"])
def test_several_tokens_in_one_pass_and_a_second_turn(architecture, kind):
    """The tokens of one pass stand at different steps."""
    _, model = pair(architecture)
    routes = SCHEDULE if kind == "schedule" else exit_rule(model, "cosine")
    sequences, logits, cache = decode(model, *prompts(), routes)
    mask = prompts()[1]
    for passes in ([7], [2, 4, 1]):
        other = model.new_cache(routes=routes)
        found, seen = [], 0
        with torch.no_grad():
            for tokens in [12, *passes]:
                seen += tokens
                full = torch.cat([mask, mask.new_ones(3, seen - 12)], dim=1)
                out = model(sequences[:, seen - tokens : seen], attention_mask=full, past_key_values=other)
                found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1)[:, 11:], logits, atol=1e-4, rtol=0)
        assert torch.equal(other.ran, cache.ran)
        assert torch.equal(other.layer_skips(), cache.layer_skips())
    # A second turn goes on at the step where the first one stopped.
    turn = torch.cat([sequences, torch.full((3, 2), 9)], dim=1)
    turn_mask = torch.cat([mask, mask.new_ones(3, 10)], dim=1)
    second, second_logits, cache = decode(model, turn, turn_mask, None, 3, past_key_values=cache)
    expected = teacher_forced(model, second, mask, routes)
    torch.testing.assert_close(second_logits, expected.logits[:, 21:-1], atol=1e-4, rtol=0)
    assert torch.equal(cache.ran, expected.ran[:, 12:-1])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_a_layer_is_freed_when_no_later_step_runs_it(architecture):
    _, model = pair(architecture)
    ids, mask = prompts()
    cache = model.new_cache(routes=SCHEDULE)
    kept = []
    with torch.no_grad():
        for step in range(-1, 6):
            tokens = ids if step < 0 else torch.full((3, 1), 7)
            full = torch.cat([mask, mask.new_ones(3, step + 1)], dim=1)
            model(tokens, attention_mask=full, past_key_values=cache)
            kept.append([layer.keys.shape[-2] > 0 for layer in cache.layers])
            assert {cache.get_seq_length(i) for i in range(LAYERS)} == {13 + step}
            assert torch.equal(cache.routes, SCHEDULE.window(step + 1, 1).expand(3, -1))
    assert kept == SCHEDULE.schedule[[0, 1, 2, 3, 4, 4, 4]].tolist()
    assert cache.layers[0].keys.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("kind", ["schedule", "exit"])
def test_beams_take_their_history_along(kind):
    _, model = pair("llama")
    routes = SCHEDULE if kind == "schedule" else exit_rule(model, "softmax")
    ids, mask = prompts()
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options |= {"output_scores": True, "length_penalty": 0.0, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=mask, routes=routes, **options)
    forced = teacher_forced(model, out.sequences, mask.repeat_interleave(3, 0), routes)
    steps = forced.logits[:, 11:-1].log_softmax(-1).gather(2, out.sequences[:, 12:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, steps, atol=1e-4, rtol=0)
    # Each cache row has the record of the beam it ended as, one step short of the last token.
    rows = {tuple(map(tuple, row.tolist())) for row in out.past_key_values.ran}
    assert rows & {tuple(map(tuple, row.tolist())) for row in forced.ran[:, 12:-1]}


def test_crop_and_copies():
    _, model = pair("llama")
    ids, mask = prompts()
    rule = exit_rule(model, "softmax")
    for routes in (SCHEDULE, rule):
        _, _, cache = decode(model, ids, mask, routes)
        ran, twin = cache.ran, copy.deepcopy(cache)
        cache.crop(-2)
        assert torch.equal(cache.ran, ran[:, :5]) and torch.equal(twin.ran, ran)
        cache.reset()
        with pytest.raises(ValueError, match="not known before the prompt"):
            _ = cache.ran
    _, _, cache = decode(model, ids, mask, SCHEDULE, 5)
    with pytest.raises(ValueError, match="cannot go back from decode step 4 to 1"):
        cache.crop(-3)


# -- pruned layers --

# The first layer and two neighbours.
PRUNED = PrunedRoutes(torch.tensor([0, 1, 0, 0, 1, 1]).bool())


@once
def pruned_pair(architecture):
    """(the model with the layers deleted, wrapped copy with all its layers that never ran one of those)."""
    base = tiny_model(architecture)
    return without_layers(base, PRUNED.ran), RouterAugmentedLM(base)


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_pruned_decoding_is_the_model_with_the_layers_deleted(architecture):
    smaller, model = pruned_pair(architecture)
    ids, mask = prompts()
    expected, expected_logits, _ = with_logits(smaller, ids, mask, max_new_tokens=8, eos_token_id=None)
    for options in ({}, {"prefill_chunk_size": 5}):
        sequences, logits, cache = decode(model, ids, mask, PRUNED, **options)
        assert torch.equal(sequences, expected)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
        assert torch.equal(cache.ran, PRUNED.ran.expand(3, 7, -1))
        assert [layer.keys.shape[-2] > 0 for layer in cache.layers] == PRUNED.ran.tolist()
    out = teacher_forced(model, sequences, mask, PRUNED)
    torch.testing.assert_close(out.logits[:, 11:-1], expected_logits, atol=1e-4, rtol=0)
    assert torch.equal(out.ran, PRUNED.ran.expand(*sequences.shape, -1))
    # Layers skipped in decode alone say something else from the first logits on.
    _, kept_prompt, _ = decode(model, ids, mask, PRUNED.ran)
    assert (kept_prompt[:, 0] - expected_logits[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "mistral"])
def test_pruned_beams_and_second_turns_are_the_model_with_the_layers_deleted(architecture):
    smaller, model = pruned_pair(architecture)
    ids, mask = prompts()
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 6}
    expected = smaller.generate(ids, attention_mask=mask, **beams)
    assert torch.equal(model.generate(ids, attention_mask=mask, routes=PRUNED, **beams), expected)
    # A second turn, and one that comes in chunks.
    for options in ({}, {"prefill_chunk_size": 2}):
        sequences, _, cache = decode(model, ids, mask, PRUNED)
        turn = torch.cat([sequences, torch.full((3, 4), 9)], dim=1)
        turn_mask = torch.cat([mask, mask.new_ones(3, 12)], dim=1)
        second, logits, same = decode(model, turn, turn_mask, None, 5, past_key_values=cache, **options)
        expected, expected_logits, _ = with_logits(smaller, turn, turn_mask, max_new_tokens=5, eos_token_id=None)
        assert same is cache and torch.equal(second, expected)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bloom"])
def test_pruned_layers_are_not_computed_for_the_prompt(architecture):
    model = RouterAugmentedLM(tiny_model(architecture))
    ids, mask = prompts()
    calls = []
    for index, layer in enumerate(decoder_layers(model.lm)):
        attention = next(m for name, m in layer.named_children() if "att" in name)
        attention.register_forward_hook(lambda *_, index=index: calls.append(index))
    kept = PRUNED.ran.nonzero().flatten().tolist()
    decode(model, ids, mask, PRUNED, 3)
    calls.clear()  # the very first pass of a model has to see what its layers return
    decode(model, ids, mask, PRUNED, 3)
    assert calls == 3 * kept


def test_a_pruned_cache_is_copied_repeated_cropped_and_reset():
    smaller, model = pruned_pair("gemma2")
    ids, mask = prompts((7, 7))
    cache = model.new_cache(routes=PRUNED)
    more = torch.full((4, 2), 9)
    with torch.no_grad():
        expected = smaller(torch.cat([ids.repeat_interleave(2, 0), more], 1)).logits[:, -2:]
        model(ids[:, :3], past_key_values=cache)
        cache.reset()
        model(ids[:, :6], past_key_values=cache)
        model(ids[:, :1], past_key_values=cache)
        cache.crop(-1)
        model(ids[:, 6:], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.arange(4))
        out = model(more, past_key_values=copy.deepcopy(cache))
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 7 and cache.skip_rate.tolist() == [0.5] * 4


# -- early exit --


@some_architectures
@pytest.mark.parametrize("confidence", ["softmax", "cosine"])
def test_early_exit_equals_the_slow_reference_and_the_teacher_forced_pass(architecture, confidence):
    base, model = pair(architecture)
    ids, mask = prompts()
    rule = exit_rule(model, confidence)
    expected, expected_logits, ran = slow_early_exit(base, ids, mask, confidence, [rule.threshold] * 5)
    assert 0.05 < 1 - ran.float().mean() < 0.8
    # With random weights, neighbouring layers of some architectures agree at the same depth for every token.
    assert len(ran.sum(2).unique()) > 1 or confidence == "cosine"
    sequences, logits, cache = decode(model, ids, mask, rule, 6)
    assert torch.equal(sequences, expected) and torch.equal(cache.ran, ran)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(cache.skip_rate, 1 - ran.float().mean((1, 2)))
    out = teacher_forced(model, sequences, mask, rule)
    torch.testing.assert_close(out.logits[:, 11:-1], expected_logits, atol=1e-4, rtol=0)
    assert torch.equal(out.ran[:, 12:-1], ran) and out.ran[:, :12].all()


def test_gap_decay_and_least_depth_equal_the_slow_reference():
    base, model = pair("llama")
    ids, mask = prompts()
    rule = exit_rule(model, "gap", min_layers=2, decay=4.0, horizon=6)
    thresholds = [0.9 * rule.threshold + 0.1 * 2.718281828 ** (-4.0 * t / 6) for t in range(5)]
    expected, _, ran = slow_early_exit(base, ids, mask, "gap", thresholds, min_layers=2)
    sequences, _, cache = decode(model, ids, mask, rule, 6)
    assert torch.equal(sequences, expected) and torch.equal(cache.ran, ran)
    assert ran[..., :2].all() and not ran.all()


def test_a_threshold_out_of_reach_is_the_dense_model_and_the_lowest_runs_the_fewest_layers():
    base, model = pair("llama")
    ids, mask = prompts()
    dense = base.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    sequences, _, cache = decode(model, ids, mask, EarlyExit(1.5), 6)
    assert torch.equal(sequences, dense) and cache.skip_rate.max() == 0
    _, _, cache = decode(model, ids, mask, EarlyExit(0.0, min_layers=2), 6)
    torch.testing.assert_close(cache.skip_rate, torch.full((3,), 4 / 6))


def test_lora_trains_under_early_exit_with_and_without_recomputation():
    gradients = []
    for recompute in (False, True):
        model = routed_model()
        torch.manual_seed(0)
        model.add_lora()
        model.eval()
        random_lora(model, std=0.02)
        model.freeze_all_but("lora")
        model.gradient_checkpointing = recompute
        ids, mask = prompts((8, 10, 12), "right")
        labels = ids.masked_fill((torch.arange(12) < 5) | (mask == 0), -100)
        rule = exit_rule(model, "softmax")
        out = model(ids, mask, labels, objective="decode_consistent", gate="hard", routes=rule)
        assert not out.ran.all()
        out.loss.backward()
        gradients.append({n: p.grad for n, p in model.lm.named_parameters() if p.grad is not None})
    assert all(any(f"layers.{i}." in name for name in gradients[0]) for i in range(LAYERS))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


# -- the types --


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.lists(st.integers(-1, 9), min_size=1, max_size=5))
def test_window_and_gates_follow_the_schedule(budgets, steps):
    budgets = sorted(budgets, reverse=True)
    routes = StepRoutes(torch.arange(6) < torch.tensor(budgets)[:, None])
    expected = [6 if t < 0 else budgets[min(t, len(budgets) - 1)] for t in steps]
    assert routes.gates(torch.tensor(steps)).sum(-1).tolist() == expected
    assert routes.window(0, 9).sum(-1).tolist() == [budgets[min(t, len(budgets) - 1)] for t in range(9)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_only_nested_schedules_are_accepted(rows):
    nested = all(a or not b for x, y in zip(rows, rows[1:], strict=False) for a, b in zip(x, y, strict=True))
    if nested:
        assert torch.equal(StepRoutes(torch.tensor(rows)).schedule, torch.tensor(rows))
    else:
        with pytest.raises(ValueError, match=r"layer \d is skipped at step \d but runs at step \d"):
            StepRoutes(torch.tensor(rows))


def test_steps_are_counted_per_row():
    response = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]]).bool()
    assert decode_steps(response).tolist() == [[-1, -1, 0, 1], [0, 1, 2, -1]]
    ran = torch.tensor([[[1, 0], [1, 1], [0, 1], [0, 1]]]).bool()
    counted = torch.tensor([[0, 1, 1, 1]]).bool()
    torch.testing.assert_close(layer_skips(ran, counted), torch.tensor([[2 / 3, 0.0]]))
    assert layer_skips(ran, torch.zeros(1, 4, dtype=torch.bool)).tolist() == [[0, 0]]


def test_routes_survive_json():
    rule = EarlyExit(0.7, "gap", 2, 4.0, 80)
    assert routes_from_json(rule.to_json()) == rule
    assert torch.equal(routes_from_json(SCHEDULE.to_json()).schedule, SCHEDULE.schedule)
    fixed = random_routes(2)
    assert torch.equal(routes_from_json(FixedRoutes(fixed).to_json()).ran, fixed)
    pruned = routes_from_json(PRUNED.to_json())
    assert isinstance(pruned, PrunedRoutes) and torch.equal(pruned.ran, PRUNED.ran)


@pytest.mark.parametrize(
    "saved", [5, "a", [1, 0], [[True], [True, False]], {}, {"pruned": [0.5]}, {"early_exit": {"p": 1}}, {"other": []}]
)
def test_damaged_routes_are_one_message(saved):
    with pytest.raises(ValueError, match="these are no saved routes"):
        routes_from_json(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepRoutes(torch.ones(6, dtype=torch.bool)), r"boolean schedule \[steps, layers\]"),
        (lambda: StepRoutes(torch.ones(2, 6)), r"boolean schedule \[steps, layers\]"),
        (lambda: PrunedRoutes(torch.ones(2, 6, dtype=torch.bool)), r"boolean tensor \[layers\] that runs one layer"),
        (lambda: PrunedRoutes(torch.ones(6)), r"boolean tensor \[layers\] that runs one layer"),
        (lambda: PrunedRoutes(torch.zeros(6, dtype=torch.bool)), r"boolean tensor \[layers\] that runs one layer"),
        (lambda: EarlyExit(0.5, "entropy"), "confidence='entropy' is unknown; choose one of softmax, gap, cosine"),
        (lambda: EarlyExit(float("nan")), "threshold=nan must be a finite number"),
        (lambda: EarlyExit(0.5, min_layers=0), "min_layers=0 must be at least 1"),
        (lambda: EarlyExit(0.5, decay=4.0), "decay=4.0 .* needs horizon >= 1"),
    ],
)
def test_bad_rules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (StepRoutes(torch.ones(2, 5, dtype=torch.bool)), "schedule of 5 layers; the model has 6"),
        (EarlyExit(0.5, min_layers=7), "min_layers=7 but the model has 6 layers"),
        (
            PrunedRoutes(torch.ones(5, dtype=torch.bool)),
            r"routes must be a boolean tensor \[6\] or \[batch, 6\] .* got \[5\]",
        ),
        ([True] * 6, "routes must be a boolean tensor, StepRoutes, EarlyExit or PrunedRoutes; got list"),
    ],
)
def test_rules_that_do_not_fit_the_model_are_refused(routes, message):
    _, model = pair("llama")
    ids, mask = prompts()
    with pytest.raises(ValueError, match=message):
        model.generate(ids, mask, routes=routes)
    with pytest.raises(ValueError, match=message):
        model(ids, mask, routes=routes, objective="decode_consistent")


def test_the_soft_objective_cannot_follow_steps():
    _, model = pair("llama")
    ids, mask = prompts()
    for routes in (SCHEDULE, EarlyExit(0.5), PRUNED):
        with pytest.raises(ValueError, match="use objective='decode_consistent'"):
            model(ids, mask, routes=routes)
