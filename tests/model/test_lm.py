"""The wrapper itself: modes, freezing, dtypes, positions, errors."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.settings import LoraSettings, RouterSettings
from support.models import ARCHITECTURES, HIDDEN, LAYERS, pair, prompts, random_routes, routed_model, tiny_model
from support.reference import prompt_rho, step_logits

every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def labelled():
    ids, mask = prompts((8, 10, 12), "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return ids, mask, labels


@every_architecture
def test_manual_steps_with_left_padding_equal_generate(architecture):
    base, model = pair(architecture)
    ids, mask = prompts()
    sequences = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    cache = model.new_cache()
    full = torch.cat([mask, mask.new_ones(3, 4)], dim=1)
    found = []
    with torch.no_grad():
        for end in range(12, 16):
            tokens = sequences[:, 0 if end == 12 else end - 1 : end]
            out = model(tokens, attention_mask=full[:, :end], past_key_values=cache)
            found.append(out.logits[:, -1])
    torch.testing.assert_close(out.rho, cache.rho)
    torch.testing.assert_close(
        torch.stack(found, 1), step_logits(base, sequences, mask, cache.routes), atol=1e-4, rtol=0
    )


def test_explicit_position_ids_are_kept():
    _, model = pair("gpt2")
    ids, mask = prompts()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        own = model(ids, attention_mask=mask, past_key_values=model.new_cache()).logits
        given = model(ids, attention_mask=mask, past_key_values=model.new_cache(), position_ids=positions).logits
        other = model(ids, attention_mask=mask, past_key_values=model.new_cache(), position_ids=positions + 3).logits
    assert torch.equal(own, given)
    assert not torch.allclose(own, other)


def test_labels_and_routes_belong_to_a_pass_without_a_cache():
    _, model = pair("llama")
    ids, _ = prompts((4,))
    for options in ({"labels": ids}, {"routes": torch.ones(LAYERS, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="labels= and routes= belong to a teacher-forced pass"):
            model(ids, past_key_values=model.new_cache(), **options)


@pytest.mark.parametrize("settings", [RouterSettings("rms"), RouterSettings(threshold=0.52)])
def test_router_settings_hold_in_every_way_to_route(settings):
    model = routed_model()
    model.routers.settings = settings
    ids, mask = prompts()
    cache = model.generate(
        ids, attention_mask=mask, max_new_tokens=2, return_dict_in_generate=True, do_sample=False
    ).past_key_values
    with torch.no_grad():
        forward = model(ids, mask)
    rho = model.prompt_rho(ids, mask)
    torch.testing.assert_close(cache.rho, rho, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(ids, mask, objective="decode_consistent", gate="hard").rho, rho, atol=1e-5, rtol=0)
    torch.testing.assert_close(forward.rho[:, 0], rho[:, 0], atol=1e-5, rtol=0)
    assert torch.equal(cache.routes, rho >= settings.threshold)
    assert torch.equal(model.route(ids, mask), rho >= settings.threshold)
    plain = prompt_rho(model.lm, model.routers.weight, ids, mask)
    assert (settings.input_norm == "rms") == (not torch.allclose(plain, rho, atol=1e-3))


def test_route_needs_no_mask_for_whole_rows():
    _, model = pair("llama")
    ids, mask = prompts((7, 7))
    assert torch.equal(model.route(ids), model.route(ids, mask))
    assert not model.prompt_rho(ids).requires_grad


def test_training_mode_touches_routers_and_lora_only():
    base = tiny_model("gpt2")
    model = RouterAugmentedLM(base)
    model.add_lora(LoraSettings(dropout=0.5))
    model.train()
    assert model.training and model.routers.training
    training = {name for name, module in base.named_modules() if module.training}
    assert training and all("lora_dropout" in name for name in training)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_a_model_in_training_mode_is_wrapped_in_training_mode():
    assert RouterAugmentedLM(tiny_model("llama").train()).training


@every_architecture
@pytest.mark.parametrize("trainable", [("routers",), ("lora",), ("routers", "lora")])
def test_gradients_flow_only_where_they_should(architecture, trainable):
    model = routed_model(architecture)
    model.add_lora()
    for name, parameter in model.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.freeze_all_but(*trainable)
    ids, mask, labels = labelled()
    out = model(ids, mask, labels)
    loss = out.loss + 0.01 * out.loss_terms["regularization"] + 0.1 * out.loss_terms["non_skip"]
    loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    expected = {name for name, _ in model.named_parameters() if name.startswith("routers") or "lora_" in name}
    expected = {name for name in expected if ("routers" if name.startswith("routers") else "lora") in trainable}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    if architecture == "mixtral":
        # An expert may see no token.
        assert with_gradient <= expected and with_gradient
    else:
        assert with_gradient == expected


def test_freezing_names_what_it_knows():
    with pytest.raises(ValueError, match="trainable='all' is unknown; choose from routers, lora"):
        routed_model().freeze_all_but("all")


def test_phase_one_regularisation_gradient_is_twice_the_weight():
    model = routed_model()
    ids, mask, labels = labelled()
    model(ids, mask, labels).loss_terms["regularization"].backward()
    torch.testing.assert_close(model.routers.weight.grad, 2 * model.routers.weight.detach())


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16)])
def test_routers_stay_fp32_whatever_the_model_becomes(convert):
    model = routed_model()
    before = model.routers.weight.detach().clone()
    convert(model)
    assert model.routers.weight.dtype == torch.float32
    assert torch.equal(model.routers.weight, before)
    assert model.lm.dtype in (torch.bfloat16, torch.float16)


def test_state_dict_round_trip():
    model, other = routed_model(), RouterAugmentedLM(tiny_model("llama", seed=1))
    other.load_state_dict(model.state_dict())
    ids, mask = prompts()
    with torch.no_grad():
        assert torch.equal(other(ids, mask).logits, model(ids, mask).logits)


def test_settings_reach_the_routers():
    model = RouterAugmentedLM(tiny_model("llama"), RouterSettings("rms", 0.4))
    assert model.routers.settings == RouterSettings("rms", 0.4)
    assert model.routers.weight.shape == (LAYERS, HIDDEN)


def test_models_with_dropout_are_wrapped_without_it():
    model = routed_model("gpt2").train()
    ids, mask, labels = labelled()
    with torch.no_grad():
        assert torch.equal(model(ids, mask, labels).logits, model(ids, mask, labels).logits)


def test_two_models_side_by_side():
    _, first = pair("llama")
    _, second = pair("gpt2")
    ids, mask = prompts()
    caches = [first.new_cache(routes=random_routes(3)), second.new_cache()]
    with torch.no_grad():
        a = first(ids, attention_mask=mask, past_key_values=caches[0])
        b = second(ids, attention_mask=mask, past_key_values=caches[1])
    assert a.rho is None
    torch.testing.assert_close(b.rho, second.prompt_rho(ids, mask), atol=1e-5, rtol=0)


def test_arguments_that_transformers_models_are_called_with():
    _, model = pair("gpt2")
    ids, mask, labels = labelled()
    with torch.no_grad():
        plain = model(ids, mask, labels=labels)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        same = model(ids, mask, labels=labels, use_cache=False, return_dict=True, position_ids=positions)
        other = model(ids, mask, labels=labels, position_ids=positions + 3)
        cached = model(ids, mask, past_key_values=model.new_cache(), use_cache=True).logits
        assert torch.equal(cached, model(ids, mask, past_key_values=model.new_cache()).logits)
    assert torch.equal(plain.logits, same.logits) and plain.loss == same.loss
    assert not torch.allclose(plain.logits, other.logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": None}, "needs input_ids"),
        ({"return_dict": False}, "return_dict=False"),
        ({"use_cache": True}, r"use_cache=True .* past_key_values=model.new_cache\(\)"),
        ({"labels": torch.zeros(3, 5, dtype=torch.long)}, r"labels must be \[3, 12\] like the tokens; got \[3, 5\]"),
        ({"labels": torch.zeros(3, 12, dtype=torch.long), "logits_to_keep": 1}, "logits_to_keep"),
        ({"attention_mask": torch.ones(3, 1, 12, 12)}, r"attention_mask must be \[batch, tokens\]"),
        (
            {"labels": torch.zeros(3, 12, dtype=torch.long), "keep_logits": False, "output_hidden_states": True},
            "output_hidden_states=True",
        ),
    ],
)
def test_arguments_that_do_not_go_together(options, message):
    _, model = pair("llama")
    ids, mask, _ = labelled()
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": ids, "attention_mask": mask} | options)
    with pytest.raises(ValueError, match="use_cache=False contradicts past_key_values"):
        model(ids, mask, past_key_values=model.new_cache(), use_cache=False)


def test_gradient_checkpointing_of_transformers_is_refused():
    model = routed_model()
    model.lm.gradient_checkpointing_enable()
    ids, mask, labels = labelled()
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing = True"):
        model(ids, mask, labels=labels)
    model.lm.gradient_checkpointing_disable()
    model(ids, mask, labels=labels)


def test_router_logits_of_experts():
    base, model = pair("mixtral")
    ids, mask = prompts()
    with torch.no_grad():
        out = model(ids, mask, routes=torch.ones(LAYERS, dtype=torch.bool), output_router_logits=True)
        expected = base(ids, attention_mask=mask, output_router_logits=True)
    torch.testing.assert_close(out.aux_loss, expected.aux_loss)
    assert len(out.router_logits) == LAYERS


def test_models_that_are_their_own_base_model_lose_no_loss():
    sizes = {**ARCHITECTURES["llama"], "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8}
    config = AutoConfig.for_model("llama4_text", **sizes)
    model = RouterAugmentedLM(AutoModelForCausalLM.from_config(config).eval())
    ids, mask, labels = labelled()
    with torch.no_grad():
        losses = [model(ids, mask, labels=labels, keep_logits=keep).loss for keep in (True, False)]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral", "gptj", "bloom", "falcon", "opt"])
def test_attentions_have_one_entry_per_layer(architecture):
    lm = tiny_model(architecture)
    lm.set_attn_implementation("eager")
    model = RouterAugmentedLM(lm)
    ids, mask = prompts()
    routes = torch.tensor([False, True, True, False, True, False])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    options |= {"output_attentions": True, "output_hidden_states": True}
    out = model.generate(ids, attention_mask=mask, routes=routes, **options)
    assert [x is not None for x in out.attentions[0]] == [True] * LAYERS
    for step, hidden in zip(out.attentions[1:], out.hidden_states[1:], strict=True):
        assert [x is not None for x in step] == routes.tolist()
        assert len(hidden) == LAYERS + 1


def test_padding_that_nobody_can_see_is_named():
    model = routed_model()
    ids, mask = prompts()
    # Told apart from the EOS token, padding is found, as in transformers.
    assert torch.equal(model.route(ids), model.route(ids, mask))
    model.lm.generation_config.pad_token_id = 2
    padded = ids.masked_fill(mask == 0, 2)
    calls = (model.route, partial(model.generate, max_new_tokens=1), model)
    for call in calls:
        with pytest.warns(UserWarning, match="attention_mask"):
            call(padded)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(padded, attention_mask=mask)
            call(padded[2:])  # nothing is padded
