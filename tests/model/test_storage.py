"""Saving, loading, and errors a user can act on."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lora import check_lora
from firstlab.model.settings import LoraSettings, RouterSettings
from firstlab.model.storage import ModelUnavailableError, load_base_config, load_tokenizer
from support.models import ARCHITECTURES, LAYERS, logits, pair, prompts, random_lora, random_routers, tiny_model
from support.texts import tiny_tokenizer


@pytest.fixture
def base_folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(path, lora=True, settings=None) -> RouterAugmentedLM:
    """A model from a folder with random routers and, if asked, working LoRA."""
    model = RouterAugmentedLM.from_pretrained(path)
    if settings is not None:
        model.routers.settings = settings
    random_routers(model, seed=4)
    if lora:
        model.add_lora(LoraSettings(rank=4, lora_alpha=16))
        random_lora(model)
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_saved_and_loaded_model_has_the_same_logits(base_folder, tmp_path, lora):
    model = trained(base_folder, lora, RouterSettings("rms", 0.45))
    model.save_pretrained(tmp_path / "saved")
    other = RouterAugmentedLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(other), logits(model))
    assert other.routers.settings == RouterSettings("rms", 0.45)
    assert other.has_lora is lora
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(other.generate(ids, **options), model.generate(ids, **options))
    # And once more from there.
    other.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "again")), logits(model))


def test_what_is_written(base_folder, tmp_path):
    model = trained(base_folder)
    model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "routers.safetensors", "adapter_config.json", "adapter_model.safetensors"} <= names
    assert not any(name.startswith(("model", "pytorch", "base")) for name in names)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(base_folder)
    assert config["router"] == asdict(RouterSettings())
    weight = load_file(tmp_path / "saved" / "routers.safetensors")["weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.routers.weight)


def test_base_saved_along_makes_a_folder_that_moves(tmp_path):
    model = RouterAugmentedLM(tiny_model("llama"))
    model.save_pretrained(tmp_path / "saved", save_base=True)
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "moved")), logits(model))


def test_a_base_without_a_place_must_be_saved_along(tmp_path):
    with pytest.raises(ValueError, match="save_base=True"):
        RouterAugmentedLM(tiny_model("llama")).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_merged_lora_is_saved_with_its_base_or_not_at_all(base_folder, tmp_path):
    model = trained(base_folder)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.save_pretrained(tmp_path / "saved", save_base=True)
    assert not (tmp_path / "saved").exists()
    # Into the folder of the unmerged model: its adapter must not be applied a second time.
    model.save_pretrained(tmp_path / "saved")
    model.merge_and_unload()
    with pytest.raises(ValueError, match="LoRA was merged into it"):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", save_base=True)
    other = RouterAugmentedLM.from_pretrained(tmp_path / "saved")
    assert not other.has_lora
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=1e-6)


def test_adapter_is_a_plain_peft_adapter(base_folder, tmp_path):
    model = trained(base_folder)
    model.save_pretrained(tmp_path / "saved")
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    peft_model = PeftModel.from_pretrained(plain, tmp_path / "saved").eval()
    ids, mask = prompts()
    with torch.no_grad():
        found = peft_model(ids, attention_mask=mask).logits
        expected = model.lm(ids, attention_mask=mask).logits
        dense = pair("llama")[0](ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, dense, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_for_the_base_and_never_for_the_routers(base_folder, tmp_path, dtype):
    model = trained(base_folder, lora=False)
    model.save_pretrained(tmp_path / "saved")
    other = RouterAugmentedLM.from_pretrained(tmp_path / "saved", dtype=dtype)
    assert other.lm.dtype == dtype
    assert other.routers.weight.dtype == torch.float32
    assert torch.equal(other.routers.weight, model.routers.weight)


def test_loading_a_plain_folder_gives_fresh_routers(base_folder):
    model = RouterAugmentedLM.from_pretrained(str(base_folder))
    ids, mask = prompts()
    with torch.no_grad():
        assert torch.equal(model.lm(ids, attention_mask=mask).logits, pair("llama")[0](ids, attention_mask=mask).logits)
    assert not model.has_lora


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "config.json holds no JSON object"),
        ('{"model_type": "firstlab"}', "has no key base_model_name_or_path and no key router"),
    ],
)
def test_incomplete_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelUnavailableError, match=message):
        RouterAugmentedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": LAYERS + 1},
            rf"9 missing \(model\.layers\.{LAYERS}\.input_layernorm\.weight, ",
        ),
        ({"intermediate_size": 64}, rf"{3 * LAYERS} misshapen \(model\.layers\.0\.mlp\.down_proj\.weight, "),
    ],
)
def test_weights_that_do_not_fit_the_config_are_not_drawn_at_random(base_folder, change, message):
    file = base_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelUnavailableError, match=f"do not fit config.json: {message}"):
        RouterAugmentedLM.from_pretrained(base_folder)


def test_code_in_a_model_folder_is_neither_run_nor_asked_about(base_folder, monkeypatch):
    file, map_ = base_folder / "config.json", {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "own", "auto_map": map_}))
    (base_folder / "code.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(ModelUnavailableError, match="needs code from the hub, which firstlab does not run"):
        RouterAugmentedLM.from_pretrained(base_folder)
    with pytest.raises(ModelUnavailableError):
        load_tokenizer(base_folder)


@pytest.mark.parametrize("folder", ["base", "saved", "adapter"])
def test_an_adapter_imports_no_package(base_folder, tmp_path, monkeypatch, folder):
    planted, saved = tmp_path / "megatron", tmp_path / "saved"
    planted.mkdir()
    (planted / "__init__.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(tmp_path)
    trained(base_folder).save_pretrained(saved)
    no_hashes(saved)
    config = json.loads((saved / "adapter_config.json").read_text())
    text = json.dumps(config | {"megatron_config": {"a": 1}, "megatron_core": "megatron.core"})
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config.json: megatron_config imports a package"):
        RouterAugmentedLM.from_pretrained(tmp_path / folder)


def test_attention_code_of_the_hub_is_named_by_the_user(base_folder):
    file = base_folder / "config.json"
    config = json.loads(file.read_text())
    for value in ("somebody/kernel", {"": "somebody/kernel"}):
        file.write_text(json.dumps(config | {"attn_implementation": value}))
        with pytest.raises(ModelUnavailableError, match="attention code of the hub, somebody/kernel, .* name it"):
            RouterAugmentedLM.from_pretrained(base_folder)
        with pytest.raises(ModelUnavailableError, match="attention code of the hub, somebody/kernel, .* name it"):
            load_base_config(base_folder)
        RouterAugmentedLM.from_pretrained(base_folder, attn_implementation="sdpa")
        check_lora(load_base_config(base_folder, attn_implementation="sdpa"), LoraSettings())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"dtype": "planted"}, "AttributeError"),
        ("config.json", {"num_hidden_layers": "6"}, "num_hidden_layers"),
        ("config.json", {"rope_parameters": [1]}, "rope_parameters"),
        ("adapter_config.json", {"peft_type": ["LORA"]}, "TypeError"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id='x' must be a token id"),
        ("generation_config.json", {"eos_token_id": [1, "x"]}, "must be a token id or a list"),
        ("generation_config.json", "[1]", "holds no JSON object"),
        ("generation_config.json", "[" * 9999, "is not valid JSON"),
        ("config.json", "[" * 9999, "is not valid JSON"),
        ("generation_config.json", '{"eos_token_id": [', "is not valid JSON"),  # transformers takes its own defaults
    ],
)
def test_damaged_files_of_a_base_are_named(base_folder, name, change, message):
    file = base_folder / name
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(change if isinstance(change, str) else json.dumps(found | change))
    with pytest.raises(ModelUnavailableError, match=message):
        RouterAugmentedLM.from_pretrained(base_folder)
    if name == "config.json":
        with pytest.raises(ModelUnavailableError, match=message):
            load_base_config(base_folder)


def test_options_whose_package_is_missing_say_so(base_folder):
    with pytest.raises(ModelUnavailableError, match="a package that it, .* is missing: install it, or drop the option"):
        RouterAugmentedLM.from_pretrained(base_folder, attn_implementation="flash_attention_2")


def test_a_broken_tokenizer_is_named(base_folder):
    tiny_tokenizer().save_pretrained(base_folder)
    file = base_folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelUnavailableError, match="the folder holds no tokenizer that can be read"):
        load_tokenizer(base_folder)


def test_truncated_base_is_named(base_folder):
    file = base_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ModelUnavailableError, match="the folder exists but cannot be read"):
        RouterAugmentedLM.from_pretrained(base_folder)


@pytest.mark.parametrize("lora", [False, True])
def test_another_base_in_its_place_is_noticed(base_folder, tmp_path, lora):
    trained(base_folder, lora).save_pretrained(tmp_path / "saved")
    tiny_model("gpt2").save_pretrained(base_folder)
    other = tiny_model("llama").config
    other.num_hidden_layers = 4
    AutoModelForCausalLM.from_config(other).save_pretrained(base_folder)
    with pytest.raises(ValueError, match="was another base model put in its place"):
        RouterAugmentedLM.from_pretrained(tmp_path / "saved")


def test_a_vanished_base_is_named(base_folder, tmp_path):
    trained(base_folder, lora=False).save_pretrained(tmp_path / "saved")
    base_folder.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelUnavailableError, match=r"base.* is not available: no such folder"):
        RouterAugmentedLM.from_pretrained(tmp_path / "saved")


def test_unknown_models_say_what_to_do():
    with pytest.raises(ModelUnavailableError, match="model.path='nobody/no-such-model'.*set model.path to its folder"):
        RouterAugmentedLM.from_pretrained("nobody/no-such-model")
    with pytest.raises(ModelUnavailableError, match="model.path='nobody/no-such-model' is not available"):
        load_tokenizer("nobody/no-such-model")


def test_empty_folders_say_what_to_do(tmp_path):
    for load, message in (
        (RouterAugmentedLM.from_pretrained, "the folder exists but cannot be read"),
        (load_tokenizer, "the folder holds no tokenizer that can be read"),
    ):
        with pytest.raises(ModelUnavailableError, match=message):
            load(tmp_path)


def test_pickled_weights_are_not_read(base_folder):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    torch.save(model.state_dict(), base_folder / "pytorch_model.bin")
    (base_folder / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match="has no safetensors, the one format read"):
        RouterAugmentedLM.from_pretrained(base_folder)


def test_tokenizer_of_a_saved_folder_is_that_of_its_base(base_folder, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base_folder)
    trained(base_folder, lora=False).save_pretrained(tmp_path / "saved")
    expected = AutoTokenizer.from_pretrained(base_folder)
    assert load_tokenizer(tmp_path / "saved").get_vocab() == expected.get_vocab()
    assert load_tokenizer(base_folder).get_vocab() == expected.get_vocab()


def test_saving_again_overwrites(base_folder, tmp_path):
    model = trained(base_folder)
    for _ in range(2):
        with torch.no_grad():
            model.routers.weight.mul_(-1)
        model.save_pretrained(tmp_path / "saved")
        other = RouterAugmentedLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(other.routers.weight, model.routers.weight)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bloom", "gemma2", "mixtral", "phi3", "gpt_neox"])
def test_other_architectures_round_trip(architecture, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base")
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_the_base_is_the_one_that_was_saved_with_the_routers(tmp_path):
    RouterAugmentedLM(tiny_model("llama")).save_pretrained(tmp_path / "saved", save_base=True)
    again = RouterAugmentedLM.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "saved")  # of the same base
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "saved")), logits(again))
    tiny_model("llama", seed=9).save_pretrained(tmp_path / "other")
    other = RouterAugmentedLM.from_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "saved")), logits(other))


def no_hashes(folder):
    """As folders were saved before config.json named their files."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["files"]
    file.write_text(json.dumps(config))


ADAPTER = {name: f"adapter_{name}" for name in ("config.json", "model.safetensors")}
EACH = ("config.json", "routers.safetensors", *ADAPTER.values())


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_what_belongs_to_the_routers_is_never_left_out(base_folder, tmp_path, name, earlier):
    saved = tmp_path / "saved"
    trained(base_folder).save_pretrained(saved)
    if earlier:
        no_hashes(saved)
    torch.save({}, saved / "adapter_model.bin")  # never read
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"{name}.*save the model again; in a run"):
        RouterAugmentedLM.from_pretrained(saved)


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_truncated_files_are_one_message(base_folder, tmp_path, name, earlier):
    saved = tmp_path / "saved"
    trained(base_folder).save_pretrained(saved)
    if earlier:
        no_hashes(saved)
    content = (saved / name).read_bytes()
    for size in (0, len(content) // 2, len(content) - 4):
        (saved / name).write_bytes(content[:size])
        with pytest.raises(
            ValueError, match=f"{name} (is missing or truncated|is not valid JSON).*save the model again"
        ):
            RouterAugmentedLM.from_pretrained(saved)


@pytest.mark.parametrize("name", EACH[1:])
def test_files_of_another_model_are_noticed(base_folder, tmp_path, name):
    for number in range(2):
        model = trained(base_folder)
        with torch.no_grad():
            model.routers.weight.add_(number)
        model.lm.peft_config["default"].lora_alpha += number
        model.save_pretrained(tmp_path / str(number))
    (tmp_path / "0" / name).write_bytes((tmp_path / "1" / name).read_bytes())
    with pytest.raises(ValueError, match=f"{name} is not the file that was saved with config.json"):
        RouterAugmentedLM.from_pretrained(tmp_path / "0")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weights": torch.zeros(LAYERS, 32)}, r"weights is \[6, 32\] in the file and absent in the model"),
        ({"weight": torch.zeros(LAYERS, 32, dtype=torch.long)}, "weight .* other than finite numbers"),
        ({"weight": torch.full((LAYERS, 32), float("nan"))}, "weight .* other than finite numbers"),
        ({"weight": torch.zeros(LAYERS + 1, 32)}, r"weight is \[7, 32\] in the file and \[6, 32\] in the model"),
    ],
)
def test_routers_that_cannot_be_meant_are_refused(base_folder, tmp_path, weights, message):
    trained(base_folder, lora=False).save_pretrained(tmp_path / "saved")
    save_file(weights, tmp_path / "saved" / "routers.safetensors")
    with pytest.raises(ValueError, match=rf"routers\.safetensors.*{message}"):
        RouterAugmentedLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"router": "rms"}, "router='rms'"),
        ("config.json", {"router": {"threshold": "0.5"}}, "router={'threshold': '0.5'}"),
        ("config.json", {"router": {"norm": "rms"}}, "unexpected keyword argument 'norm'"),
        ("config.json", {"base_model_name_or_path": 5}, "base_model_name_or_path must be text"),
        ("config.json", {"files": []}, "files an object"),
        ("config.json", {"model_type": "llama"}, "must have model_type='firstlab'"),
        ("adapter_config.json", {"r": "4"}, "r='4' must be a number"),
        ("adapter_config.json", {"r": None}, "r=None must be a number"),
        ("adapter_config.json", {"base_model_name_or_path": 3}, "base_model_name_or_path=3 must be text"),
        ("adapter_config.json", {"target_modules": 3}, "target_modules=3 must be names of modules"),
        ("adapter_config.json", {"peft_type": "IA3"}, "peft_type must be LORA"),
        ("adapter_config.json", {"target_modules": "("}, "unterminated subpattern"),
        ("adapter_config.json", {"bias": "x"}, "not implemented"),
        ("adapter_config.json", {"future_option": True}, "the installed PEFT knows no 'future_option'"),
    ],
)
def test_wrong_types_and_unknown_keys_are_one_message(base_folder, tmp_path, name, change, message):
    saved = tmp_path / "saved"
    trained(base_folder).save_pretrained(saved)
    no_hashes(saved)
    file = saved / name
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=rf"{name}.*{message}.*"):
        RouterAugmentedLM.from_pretrained(saved)


def test_keys_of_a_newer_peft_that_are_off_do_not_matter(base_folder, tmp_path):
    model, saved = trained(base_folder), tmp_path / "saved"
    model.save_pretrained(saved)
    no_hashes(saved)
    file = saved / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"future_option": None}))
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(saved)), logits(model))


def test_home_is_spelled_out(base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = RouterAugmentedLM.from_pretrained("~/base")
    model.save_pretrained("~/saved")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained("~/saved", base="~/base")), logits(model))
    assert (tmp_path / "saved").is_dir() and not (tmp_path / "~").exists()
    with pytest.raises(ModelUnavailableError, match="holds no tokenizer"):
        load_tokenizer("~/saved")


def test_a_merged_base_takes_its_tokenizer_and_generation_config_along(base_folder, tmp_path):
    model = trained(base_folder)
    model.lm.generation_config.eos_token_id = [2, 9]
    model.merge_and_unload().save_pretrained(tmp_path / "without", save_base=True)
    message = (
        r"the tokenizer of model.path='.*/without/base' .* put it there with tokenizer.save_pretrained\('.*base'\)"
    )
    with pytest.raises(ModelUnavailableError, match=message):
        load_tokenizer(tmp_path / "without")
    tiny_tokenizer().save_pretrained(base_folder)
    model.save_pretrained(tmp_path / "with", save_base=True)
    assert load_tokenizer(tmp_path / "with").get_vocab() == tiny_tokenizer().get_vocab()
    assert RouterAugmentedLM.from_pretrained(tmp_path / "with").lm.generation_config.eos_token_id == [2, 9]


@pytest.mark.skipif("laguna" not in CONFIG_MAPPING, reason="not in this transformers")
def test_modules_that_the_hubs_checkpoint_names_otherwise(tmp_path):
    sizes = {**ARCHITECTURES["qwen3"], "sliding_window": 8, "num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("laguna", **sizes))
    lm.save_pretrained(tmp_path / "base")
    model = RouterAugmentedLM.from_pretrained(tmp_path / "base")
    model.add_lora(LoraSettings(dropout=0.0))
    random_lora(model)
    assert any("shared_experts" in name for name, _ in model.lm.named_parameters())
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_an_adapter_that_lacks_a_weight_is_named(base_folder, tmp_path):
    trained(base_folder).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "adapter_model.safetensors"
    adapter = load_file(file)
    del adapter["base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight"]
    save_file(adapter, file)
    message = r"layers\.3\.self_attn\.q_proj\.lora_B\.weight is absent in the file and \[32, 4\] in the model"
    with pytest.raises(ValueError, match=message):
        RouterAugmentedLM.from_pretrained(tmp_path / "saved")


def test_an_adapter_that_transformers_loaded(base_folder, tmp_path):
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), settings)
    adapted.save_pretrained(tmp_path / "adapter")
    model = RouterAugmentedLM.from_pretrained(tmp_path / "adapter")
    expected = logits(model)
    assert model.has_lora
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "saved")), expected)
    model.merge_and_unload().save_pretrained(tmp_path / "merged", save_base=True)
    merged = RouterAugmentedLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_name(base_folder, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(base_folder)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    lm.add_adapter(settings, adapter_name="mine")
    model = RouterAugmentedLM(lm)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(RouterAugmentedLM.from_pretrained(tmp_path / "saved")), logits(model))
    lm.add_adapter(settings, adapter_name="yours")
    with pytest.raises(ValueError, match=r"several adapters \(mine, yours\)"):
        model.save_pretrained(tmp_path / "both")
