from __future__ import annotations

import warnings

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lora import check_lora, linear_names, lora_layers, lora_parameters
from firstlab.model.settings import LoraSettings
from support.models import ARCHITECTURES, LAYERS, logits, pair, prompts, random_lora, routed_model, tiny_model

every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


def with_lora(architecture: str = "llama", **settings) -> RouterAugmentedLM:
    """Routed model whose LoRA layers do something."""
    model = routed_model(architecture)
    torch.manual_seed(7)
    model.add_lora(LoraSettings(**settings))
    random_lora(model)
    return model


def test_llama_adapts_exactly_the_papers_modules():
    model = routed_model()
    names = linear_names(model.lm)
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.rpartition(".")[2] for name in names} == kinds
    model.add_lora()
    layers = list(lora_layers(model.lm))
    assert len(layers) == len(names) == 7 * LAYERS
    for layer in layers:
        assert layer.r["default"] == 8
        assert layer.scaling["default"] == 32 / 8
        assert layer.lora_dropout["default"].p == 0.1


@every_architecture
def test_fresh_lora_changes_nothing_and_covers_every_layer(architecture):
    model = routed_model(architecture)
    before = logits(model)
    inside = linear_names(model.lm)
    model.add_lora()
    assert model.has_lora
    assert torch.equal(logits(model), before)
    adapted = {name for name, module in model.lm.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(inside)
    assert len({name.split(".layers.")[-1].split(".h.")[-1].split(".")[0] for name in adapted}) == LAYERS


@every_architecture
def test_merged_logits_are_the_same(architecture):
    model = with_lora(architecture)
    names = list(tiny_model(architecture).state_dict())
    plain, expected = logits(routed_model(architecture)), logits(model)
    assert (expected - plain).abs().max() > 1e-3
    assert model.merge_and_unload() is model
    assert not model.has_lora
    assert not any(isinstance(m, LoraLayer) for m in model.modules())
    assert list(model.lm.state_dict()) == names
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    # A merged model can take fresh LoRA layers.
    model.add_lora()
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)


def test_merged_llama_is_close_to_the_last_digits():
    model = with_lora()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, atol=1e-5, rtol=1e-5)


def test_merging_without_lora_changes_nothing():
    model = routed_model()
    before = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), before)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("trainable", ["routers", "lora"])
def test_disabled_lora_is_the_base_and_trainable_flags_survive(architecture, trainable):
    model = with_lora(architecture)
    model.freeze_all_but(trainable)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapted = logits(model)
    with model.lora_disabled():
        torch.testing.assert_close(logits(model), logits(pair(architecture)[1]), atol=1e-6, rtol=1e-6)
    assert torch.equal(logits(model), adapted)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(RuntimeError, match="stop"), model.lora_disabled():
        raise RuntimeError("stop")
    assert torch.equal(logits(model), adapted)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_disabling_without_lora_is_harmless():
    _, model = pair("llama")
    with model.lora_disabled():
        assert torch.equal(logits(model), logits(model))


def test_target_modules_choose_a_part():
    model = routed_model()
    model.add_lora(LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]))
    assert len(list(lora_layers(model.lm))) == 2 * LAYERS


def test_target_modules_that_match_nothing_are_named():
    for names, unknown in ((["lm_head"], "lm_head"), (["q_proj", "v_porj"], "v_porj")):
        with pytest.raises(ValueError, match=rf"have no linear map {unknown}; choose from q_proj, k_proj"):
            routed_model().add_lora(LoraSettings(target_modules=names))
        # And before any weights are there.
        with pytest.raises(ValueError, match=rf"have no linear map {unknown}; choose from q_proj, k_proj"):
            check_lora(tiny_model("llama").config, LoraSettings(target_modules=names))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank=0 must be at least 1"),
        ({"lora_alpha": 0}, "lora.lora_alpha=0 must be at least 1"),
        ({"dropout": 1.0}, "lora.dropout=1.0 must be at least 0 and below 1"),
        ({"target_modules": []}, r"lora.target_modules=\[\] names nothing"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)


def test_a_rank_above_the_smaller_side_is_named():
    config = tiny_model("llama").config
    with pytest.warns(
        UserWarning, match=r"lora.rank=17 .* 12 linear map\(s\), such as .*k_proj \[16, 32\]: more than 16"
    ):
        assert len(check_lora(config, LoraSettings(rank=17))) == 7 * LAYERS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_lora(config, LoraSettings(rank=16))
        check_lora(config, LoraSettings(rank=17, target_modules=["q_proj"]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "dots1"])
def test_adapters_are_float32_on_any_base(architecture, tmp_path):
    """Forward, autocast, backward, a file, moves, and merging."""
    dtype = torch.bfloat16
    lm = AutoModelForCausalLM.from_config(dots1_config()) if architecture == "dots1" else tiny_model(architecture)
    lm.to(dtype).save_pretrained(tmp_path / "base")
    model = RouterAugmentedLM.from_pretrained(tmp_path / "base", dtype=dtype)
    model.add_lora(LoraSettings(rank=2, dropout=0.0))
    random_lora(model)
    model.freeze_all_but("lora")
    ids, mask = prompts(side="right")
    out = model(ids, mask, labels=ids)
    out.loss.backward()
    assert out.logits.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, mask, labels=ids).loss.backward()
    weights = lora_parameters(model.lm)
    assert weights and {p.dtype for p in weights} == {p.grad.dtype for p in weights} == {torch.float32}
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert {x.dtype for x in load_file(tmp_path / "saved" / "adapter_model.safetensors").values()} == {torch.float32}
    other = RouterAugmentedLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert {p.dtype for p in lora_parameters(other.lm)} == {torch.float32}
    assert torch.equal(logits(other), expected)
    model.half()
    assert all(torch.equal(p, q) for p, q in zip(weights, lora_parameters(other.lm), strict=True))
    other.merge_and_unload()
    assert {p.dtype for p in other.lm.parameters()} == {dtype}
    torch.testing.assert_close(logits(other), expected, atol=0.2, rtol=0.1)


@pytest.mark.parametrize(("architecture", "maps"), [("phimoe", 4), ("falcon", 4), ("ctrl", 6)])
def test_linear_maps_of_unusual_layers(architecture: str, maps: int):
    """Routers of experts that give a tuple, maps with their own forward, and maps of a numbered list."""
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= (
        {"n_embd": 32, "dff": 16} if architecture == "ctrl" else {"intermediate_size": 16, "num_key_value_heads": 4}
    )
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **small))
    model = RouterAugmentedLM(lm.eval())
    model.add_lora()
    assert len(list(lora_layers(lm))) == 2 * maps
    ids = torch.randint(3, 97, (2, 6))
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    model.merge_and_unload()
    assert torch.allclose(model(input_ids=ids).logits, out.logits, atol=1e-5)


def test_maps_outside_the_decoder_layers_stay():
    lm = tiny_model("llama")
    lm.tower = torch.nn.Module()
    lm.tower.q_proj = torch.nn.Linear(4, 4)
    model = RouterAugmentedLM(lm)
    model.add_lora(LoraSettings(target_modules=["q_proj"]))
    assert len(list(lora_layers(lm))) == LAYERS and type(lm.tower.q_proj) is torch.nn.Linear


def dots1_config():
    """Experts whose stacked weights PEFT adapts as well."""
    config = AutoConfig.for_model(
        "dots1", vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config.update({"n_routed_experts": 2, "moe_intermediate_size": 16, "intermediate_size": 48, "head_dim": 8})
    config.update({"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1})
    return config


def test_experts_that_peft_adapts_only_without_dropout():
    config = dots1_config()
    with pytest.raises(ValueError, match=r"lora\.dropout=0\.1: PEFT adapts the stacked experts .* set lora\.dropout=0"):
        RouterAugmentedLM(AutoModelForCausalLM.from_config(config)).add_lora()
    model = RouterAugmentedLM(AutoModelForCausalLM.from_config(config))
    names = set(model.lm.state_dict())
    model.add_lora(LoraSettings(dropout=0.0))
    random_lora(model)
    before = logits(model)
    model.merge_and_unload()
    assert set(model.lm.state_dict()) == names
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_second_lora_is_refused():
    with pytest.raises(ValueError, match="already has LoRA layers; merge_and_unload"):
        with_lora().add_lora()


def test_dropout_acts_in_training_only():
    model = with_lora(dropout=0.5)
    ids, mask = prompts(side="right")
    evaluated = logits(model)
    assert torch.equal(logits(model), evaluated)
    model.train()
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(ids, mask).logits
        second = model(ids, mask).logits
    assert not torch.equal(first, second)
    assert torch.equal(logits(model.eval()), evaluated)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_routed_decoding_runs_with_lora_as_when_merged(architecture):
    model = with_lora(architecture)
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "output_logits": True}
    before = model.generate(ids, return_dict_in_generate=True, **options)
    after = model.merge_and_unload().generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(before.past_key_values.routes, after.past_key_values.routes)
    for a, b in zip(before.logits, after.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
