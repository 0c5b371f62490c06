import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from firstlab.model.layers import RoutableLayer, find_decoder, make_dense, make_routable
from firstlab.model.lm import RouterAugmentedLM
from support.models import ARCHITECTURES, HIDDEN, LAYERS, prompts, random_routes, routed_model, tiny_model

every_architecture = pytest.mark.parametrize("architecture", list(ARCHITECTURES))


@every_architecture
def test_find_decoder_finds_all_layers(architecture):
    model = tiny_model(architecture)
    decoder, layers = find_decoder(model)
    assert len(layers) == LAYERS
    assert any(child is layers for child in decoder.children())


@every_architecture
def test_wrapping_keeps_parameters_names_and_logits(architecture):
    base = tiny_model(architecture)
    ids, mask = prompts()
    with torch.no_grad():
        logits = base(ids, attention_mask=mask).logits
    before = {name: value.clone() for name, value in base.state_dict().items()}
    names = [name for name, _ in base.named_modules()]
    model = RouterAugmentedLM(base)
    assert model.lm is base
    assert [name for name, _ in base.named_modules()] == names
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert set(model.state_dict()) == {"routers.weight", *(f"lm.{name}" for name in before)}
    with torch.no_grad():
        assert torch.equal(base(ids, attention_mask=mask).logits, logits)


def test_routable_layers_are_still_layers_of_their_class():
    base = tiny_model("llama")
    dense_class = type(base.model.layers[0])
    RouterAugmentedLM(base)
    for index, layer in enumerate(base.model.layers):
        assert isinstance(layer, dense_class) and isinstance(layer, RoutableLayer)
        assert type(layer).__name__ == dense_class.__name__
        assert layer.layer_index == index
    # Made once per class, and making it twice changes nothing.
    classes = {type(layer) for layer in base.model.layers}
    make_routable(base.model.layers)
    assert {type(layer) for layer in base.model.layers} == classes and len(classes) == 1
    make_dense(base.model.layers)
    assert {type(layer) for layer in base.model.layers} == {dense_class}


@every_architecture
def test_unwrap_gives_the_plain_model_back(architecture):
    base = tiny_model(architecture)
    decoder, layers = find_decoder(base)
    classes, hooks = [type(x) for x in layers], len(decoder._forward_pre_hooks) + len(decoder._forward_hooks)
    attributes = [set(vars(x)) for x in layers]
    model = RouterAugmentedLM(base)
    plain = model.unwrap()
    assert plain is base
    assert [type(x) for x in layers] == classes
    assert len(decoder._forward_pre_hooks) + len(decoder._forward_hooks) == hooks
    assert [set(vars(x)) for x in layers] == attributes
    again = RouterAugmentedLM(plain)
    ids, mask = prompts((4, 6))
    assert again.generate(ids, attention_mask=mask, max_new_tokens=2).shape[1] == 8


@pytest.mark.parametrize(
    ("architecture", "duplicate"),
    [("llama", "deepcopy"), ("llama", "pickle"), ("llama", "torch.save"), ("gpt2", "deepcopy"), ("bloom", "pickle")],
)
def test_copies_work_and_are_independent(architecture, duplicate, tmp_path):
    model = routed_model(architecture)
    model.add_lora()
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    if duplicate == "deepcopy":
        other = copy.deepcopy(model)
    elif duplicate == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(other.generate(ids, **options), expected)
    assert torch.equal(other.route(ids, mask), model.route(ids, mask))
    with torch.no_grad():
        other.routers.weight.neg_()
    assert not torch.equal(other.route(ids, mask), model.route(ids, mask))
    plain = other.unwrap()
    assert not any(isinstance(m, RoutableLayer) for m in plain.modules())
    decoder, _ = find_decoder(plain)
    assert not decoder._forward_hooks and not decoder._forward_pre_hooks
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders_are_refused(architecture):
    sizes = {"d_model": 16, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 30, "d_ff": 16}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(architecture, **sizes))
    with pytest.raises(ValueError, match="is an encoder-decoder model; only decoder-only models can be routed"):
        RouterAugmentedLM(model)


def test_models_without_a_head_are_refused():
    with pytest.raises(ValueError, match="LlamaModel has no language-model head; load it with AutoModelForCausalLM"):
        RouterAugmentedLM(tiny_model("llama").model)


TINY = {"vocab_size": 31, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("architecture", "sizes", "message"),
    [
        (
            "rwkv",
            {"hidden_size": 16, "attention_hidden_size": 16, "vocab_size": 31, "num_hidden_layers": 2},
            "RwkvModel, which runs the layers, takes no past_key_values",
        ),
        ("bert", {**TINY, "num_hidden_layers": 2}, "BertEncoder, which runs the layers, takes no input_ids;"),
        ("openai-gpt", {"n_embd": 16, "n_layer": 2, "n_head": 2}, "OpenAIGPTModel, .* takes no past_key_values"),
        ("recurrent_gemma", {**TINY, "num_hidden_layers": 3}, "RecurrentGemmaConfig: .* state-space, recurrent"),
    ],
)
def test_models_without_one_kv_cache_per_layer_are_refused_when_wrapped(architecture, sizes, message):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    with pytest.raises(ValueError, match=message):
        RouterAugmentedLM(model)


def fake(**lists: nn.Module) -> nn.Module:
    model = nn.Module()
    text = SimpleNamespace(num_hidden_layers=3, hidden_size=4)
    model.config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda decoder: text)
    for name, module in lists.items():
        model.add_module(name, module)
    return model


def linears(count: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(count))


@pytest.mark.parametrize(
    ("lists", "found"),
    [({}, "none"), ({"layers": linears(2)}, "none"), ({"layers": linears(3), "others": linears(3)}, "layers, others")],
)
def test_models_without_exactly_one_list_of_layers_are_refused(lists, found):
    with pytest.raises(ValueError, match=f"expected exactly one ModuleList of 3 decoder layers, found {found};"):
        RouterAugmentedLM(fake(**lists))


def test_lists_inside_a_layer_are_not_the_list_of_layers():
    layers = linears(3)
    for layer in layers:
        layer.experts = linears(3)
    assert find_decoder(fake(layers=layers))[1] is layers


def test_another_architecture_needs_no_code():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = AutoConfig.for_model("stablelm", num_hidden_layers=3, vocab_size=97, **sizes)
    model = RouterAugmentedLM(AutoModelForCausalLM.from_config(config).eval())
    assert model.num_layers == 3
    ids, mask = prompts()
    assert model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0).shape == (3, 14)


@pytest.mark.parametrize("first", ["cpu", "disk"])
def test_layers_behind_hooks_of_accelerate_are_routed(tmp_path, first):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {f"model.layers.{layer}": first if layer < 3 else "disk" for layer in range(LAYERS)}
    options = {"device_map": places, "offload_folder": tmp_path / "weights"}
    hooked = RouterAugmentedLM.from_pretrained(tmp_path / "model", **options)
    model = routed_model()
    hooked.routers.load_state_dict(model.routers.state_dict())
    ids, mask = prompts()
    routes = random_routes(3)
    for forced in (None, routes, routes[1]):
        given = {"attention_mask": mask, "routes": forced, "max_new_tokens": 5}
        assert torch.equal(hooked.generate(ids, **given), model.generate(ids, **given))
    with torch.no_grad():
        for keep in (True, False):
            labelled = {"labels": ids, "routes": routes, "objective": "decode_consistent", "keep_logits": keep}
            torch.testing.assert_close(hooked(ids, mask, **labelled).loss, model(ids, mask, **labelled).loss)
    plain = hooked.unwrap()
    assert torch.equal(plain.generate(ids, attention_mask=mask), tiny_model("llama").generate(ids, attention_mask=mask))


def test_a_model_may_be_wrapped_again():
    model = routed_model()
    ids, mask = prompts()
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4)
    other = RouterAugmentedLM(model.lm)
    other.routers.load_state_dict(model.routers.state_dict())
    for each in (model, other):
        given = {"attention_mask": mask, "max_new_tokens": 4}
        assert torch.equal(each.generate(ids, **given), expected)
        assert torch.equal(each.generate(ids, prefill_chunk_size=4, **given), expected)
    other.unwrap()
    for call in (model.generate, model.route, model):
        with pytest.raises(ValueError, match="the model was unwrapped"):
            call(ids, mask)


def test_what_is_wrapped_otherwise_is_named():
    model = routed_model()
    with pytest.raises(ValueError, match="wrapped already"):
        RouterAugmentedLM(model)
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"PEFT's wrapper: pass peft_model.merge_and_unload"):
        RouterAugmentedLM(adapted)
    assert RouterAugmentedLM(adapted.merge_and_unload()).num_layers == LAYERS


def test_layers_that_need_more_than_hidden_states_are_refused():
    sizes = {**ARCHITECTURES["llama"], "is_decoder": True, "is_encoder_decoder": False, "d_model": 32}
    bart = AutoModelForCausalLM.from_config(AutoConfig.for_model("bart", decoder_layers=LAYERS, **sizes))
    with pytest.raises(ValueError, match="BartForCausalLM cannot be routed: it has a table of positions"):
        RouterAugmentedLM(bart)
    prophetnet = AutoConfig.for_model(
        "prophetnet", hidden_size=32, num_encoder_layers=LAYERS, num_decoder_layers=LAYERS
    )
    prophetnet.update({"is_encoder_decoder": False, "is_decoder": True, "num_decoder_attention_heads": 4})
    with pytest.raises(ValueError, match="ProphetNetForCausalLM cannot be routed: it has a table of positions"):
        RouterAugmentedLM(AutoModelForCausalLM.from_config(prophetnet))
    model = routed_model()
    config, mlp = model.lm.config, model.lm.model.layers[1].mlp
    streams = r"pass on 4 hidden states of every token \({}\)"
    for owner, name, value, message in (
        (config, "indexer_types", ["full", "shared"] * 3, "layers with a shared indexer"),
        (mlp, "router_states_scale", 1.0, "routers of experts need what the layer below has found"),
        *((config, name, 4, streams.format(name)) for name in ("hc_mult", "hc_count", "altup_num_inputs")),
        (config, "cross_attention_layers", [2], "layers that attend to an image do not run on a prompt of text"),
    ):
        setattr(owner, name, value)
        with pytest.raises(ValueError, match=message):
            RouterAugmentedLM(model.lm)
        delattr(owner, name)
    layer, states = model.lm.model.layers[0], torch.zeros(1, 2, 4, HIDDEN)
    with pytest.raises(ValueError, match=r"takes hidden states of shape \[1, 2, 4, 32\]"):
        layer(states, past_key_values=model.new_cache())
