"""transformers' own entry points give the routed model: Auto classes, pipelines, saving, PEFT."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, pipeline

from firstlab.hub import register
from firstlab.hub.config import FirstlabConfig
from firstlab.hub.modeling import FirstlabForCausalLM
from firstlab.model.cache import RoutedCache
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lora import LoraSettings
from firstlab.model.storage import ModelUnavailableError, load_tokenizer
from support.models import prompts, random_routers

TEMPLATE = "{% for each in messages %}{{ each['role'] }}: {{ each['content'] }}\n{% endfor %}"


def saved_model(base: Path, folder: Path, lora: bool = True) -> RouterAugmentedLM:
    """A model with routers that differ from prompt to prompt, and LoRA that does something, saved by the library."""
    model = RouterAugmentedLM.from_pretrained(base)
    random_routers(model)
    if lora:
        model.add_lora(LoraSettings(rank=4))
        with torch.no_grad():
            for name, parameter in model.lm.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def library(tiny_model_dir, tmp_path_factory):
    """(folder, the model in it)"""
    folder = tmp_path_factory.mktemp("saved") / "mine"
    return folder, saved_model(tiny_model_dir, folder)


@pytest.fixture(scope="module")
def routed(library):
    return AutoModelForCausalLM.from_pretrained(library[0])


def test_auto_classes_give_the_routed_model(library, routed):
    folder, model = library
    assert isinstance(routed, FirstlabForCausalLM) and isinstance(routed, PreTrainedModel)
    assert isinstance(AutoConfig.from_pretrained(folder), FirstlabConfig)
    ids, mask = prompts()
    assert torch.equal(routed.route(ids, mask), model.route(ids, mask))
    assert not routed.route(ids, mask).all()
    expected = model.generate(ids, mask, max_new_tokens=6)
    assert torch.equal(routed.generate(ids, attention_mask=mask, max_new_tokens=6), expected)
    assert torch.equal(routed.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6), expected)
    forced = torch.ones(4, dtype=torch.bool)
    dense = model.generate(ids, mask, routes=forced, max_new_tokens=6)
    assert torch.equal(routed.generate(ids, attention_mask=mask, routes=forced, max_new_tokens=6), dense)


def test_the_first_pass_is_prefill_and_its_cache_carries_the_routes(library, routed):
    ids, mask = prompts()
    with torch.no_grad():
        first = routed(ids, attention_mask=mask)
        assert isinstance(first.past_key_values, RoutedCache) and not first.past_key_values.routes.all()
        assert routed(ids, attention_mask=mask, use_cache=False).past_key_values is None
        token = first.logits[:, -1:].argmax(-1)
        longer = torch.cat([mask, torch.ones_like(token)], 1)
        second = routed(token, attention_mask=longer, past_key_values=first.past_key_values)
    together = torch.cat([token, second.logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(routed.generate(ids, attention_mask=mask, max_new_tokens=2)[:, -2:], together)


def test_labels_are_scored_as_decode_scores_them(library, routed):
    ids, _ = prompts((9, 9, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        found = routed(ids, labels=labels)
        cache = routed.routed.new_cache()
        logits = [routed.routed(ids[:, :5], past_key_values=cache).logits[:, -1]]
        for step in range(5, 8):
            logits.append(routed.routed(ids[:, step : step + 1], past_key_values=cache).logits[:, -1])
    loss = torch.nn.functional.cross_entropy(torch.stack(logits, 1).flatten(0, 1), ids[:, 5:].flatten())
    torch.testing.assert_close(found.loss, loss)
    with pytest.raises(ValueError, match="leaves no prompt"):
        routed(ids, labels=ids)


def test_what_is_published_travels_together(library, routed, tiny_model_dir, tmp_path):
    routed.generation_config.max_new_tokens = 3
    routed.source = None
    published = tmp_path / "published"
    try:
        routed.save_pretrained(published)
        tokenizer = AutoTokenizer.from_pretrained(published)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(published)
        again = AutoModelForCausalLM.from_pretrained(published)
        again.save_pretrained(tmp_path / "twice")
    finally:
        routed.generation_config.max_new_tokens = None
    last = tmp_path / "twice"
    assert GenerationConfig.from_pretrained(last).max_new_tokens == 3
    assert AutoTokenizer.from_pretrained(last).chat_template == TEMPLATE
    cards = [(each / "README.md").read_text() for each in (published, last)]
    assert cards[1] == cards[0].replace("'published'", "'twice'") and "from_pretrained('twice')" in cards[1]
    assert json.loads((last / "config.json").read_text())["files"].keys() == {
        "routers.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
    }  # fmt: skip
    ids, mask = prompts()
    expected = routed.generate(ids, attention_mask=mask, max_new_tokens=3)
    for other in (AutoModelForCausalLM.from_pretrained(last), RouterAugmentedLM.from_pretrained(last).eval()):
        assert torch.equal(other.generate(ids, attention_mask=mask, max_new_tokens=3), expected)
    # Our adapter in plain PEFT: the same teacher-forced logits as with every layer running.
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), last, subfolder="adapter")
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, routed(ids, use_cache=False).logits)


def test_a_pipeline_chats(library, tmp_path):
    folder, model = library
    published = tmp_path / "chat"
    FirstlabForCausalLM.from_pretrained(folder).save_pretrained(published)
    tokenizer = AutoTokenizer.from_pretrained(published)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(published)
    chat = [{"role": "user", "content": "the red house"}]
    [answer] = pipeline("text-generation", model=str(published))(chat, max_new_tokens=5, do_sample=False)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=5)[0, ids.shape[1] :]
    assert answer["generated_text"][-1] == {"role": "assistant", "content": tokenizer.decode(new)}


def test_a_folder_inside_a_run_has_the_tokenizer_of_its_base(library, tiny_model_dir):
    text = "the small dog"
    assert AutoTokenizer.from_pretrained(library[0])(text) == AutoTokenizer.from_pretrained(tiny_model_dir)(text)


def test_a_hub_id_is_read_from_the_cache(library, routed, tmp_path):
    """The layout of the hub's cache, as a download leaves it: no network, and no code in between."""
    snapshot = tmp_path / "models--me--mine" / "snapshots" / ("a" * 40)
    routed.save_pretrained(snapshot)
    (snapshot / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (snapshot / "pytorch_model.bin").write_bytes(b"cbuiltins\nexit\n(tR.")  # a pickle that ends who reads it
    config = json.loads((snapshot / "config.json").read_text())
    evil = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (snapshot / "config.json").write_text(json.dumps({**config, "auto_map": evil}))
    refs = tmp_path / "models--me--mine" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    ids, mask = prompts()
    expected = routed.route(ids, mask)
    found = AutoModelForCausalLM.from_pretrained("me/mine", cache_dir=tmp_path, trust_remote_code=True)
    assert isinstance(found, FirstlabForCausalLM)
    assert torch.equal(found.route(ids, mask), expected)
    assert torch.equal(RouterAugmentedLM.from_pretrained("me/mine", cache_dir=tmp_path).route(ids, mask), expected)
    (snapshot / "tokenizer_config.json").unlink()  # as where a folder inside a run was uploaded
    assert AutoTokenizer.from_pretrained("me/mine", cache_dir=tmp_path)("the dog") == load_tokenizer(library[0])(
        "the dog"
    )
    with pytest.raises(ModelUnavailableError, match="the hub has no such model or cannot be reached: check the name"):
        FirstlabForCausalLM.from_pretrained("me/other", cache_dir=tmp_path)
    (snapshot / "config.json").write_text("{")
    with pytest.raises(ModelUnavailableError, match="config.json is not valid JSON"):
        RouterAugmentedLM.from_pretrained("me/mine", cache_dir=tmp_path)


def test_a_subfolder_is_the_one_that_is_loaded(library, routed, tiny_model_dir, tmp_path):
    routed.save_pretrained(tmp_path / "inner")
    RouterAugmentedLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)  # other routers, at the top
    ids, mask = prompts()
    for kind in (AutoModelForCausalLM, RouterAugmentedLM):
        found = kind.from_pretrained(tmp_path, subfolder="inner")
        assert torch.equal(found.route(ids, mask), routed.route(ids, mask))
    assert AutoTokenizer.from_pretrained(tmp_path, subfolder="inner")("the dog") == load_tokenizer(library[0])(
        "the dog"
    )


def test_options_of_from_pretrained_reach_the_base(library):
    options = {"attn_implementation": "eager", "dtype": torch.bfloat16, "device_map": "cpu", "low_cpu_mem_usage": True}
    found = AutoModelForCausalLM.from_pretrained(library[0], **options)
    assert found.config._attn_implementation == found.routed.lm.config._attn_implementation == "eager"
    assert found.dtype == torch.bfloat16 and found.routed.layer_routers.weight.dtype == torch.float32


def test_a_damaged_generation_config_is_named(routed, tmp_path):
    routed.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": "x"}))
    with pytest.raises(ModelUnavailableError, match="generation_config.json: eos_token_id='x' must be a token id"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_nobody_else_could_load_is_not_uploaded(library, routed, monkeypatch):
    with pytest.raises(ValueError, match="which nobody else can load: call merge_and_unload"):
        routed.push_to_hub("me/mine")
    sent = {}

    class Api:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["card"] = (folder_path / "README.md").read_text()
            sent["files"] = {file.relative_to(folder_path).as_posix() for file in folder_path.rglob("*.*")}
            return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr("firstlab.hub.modeling.HfApi", Api)
    merged = FirstlabForCausalLM.from_pretrained(library[0]).merge_and_unload()
    assert merged.push_to_hub("me/mine", save_base=True, token="t") == "https://huggingface.co/me/mine"
    assert {"config.json", "routers.safetensors", "README.md", "base/model.safetensors"} <= sent["files"]
    assert not any("adapter" in name for name in sent["files"])
    assert "from_pretrained('me/mine')" in sent["card"] and "- base model: in `base/`\n" in sent["card"]


def test_refusals_name_the_way_out(library, tiny_model_dir):
    with pytest.raises(ValueError, match="is no folder of firstlab; use RouterAugmentedLM"):
        FirstlabForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(ValueError, match="no models with random weights"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(library[0]))
    with pytest.raises(ValueError, match="output_loading_info"):
        AutoModelForCausalLM.from_pretrained(library[0], output_loading_info=True)


def test_a_card_without_a_run_promises_nothing(library, tmp_path):
    FirstlabForCausalLM.from_pretrained(library[0]).save_pretrained(tmp_path / "card")
    card = ModelCard.load(tmp_path / "card" / "README.md")
    assert card.data.tags == ["layer-skipping", "firstlab", "peft"] and card.data.pipeline_tag == "text-generation"
    assert "Measured" not in card.text and "all 4 decoder layers run" in card.text


def test_saving_again_leaves_no_adapter_behind(library, tmp_path):
    model = FirstlabForCausalLM.from_pretrained(library[0])
    model.save_pretrained(tmp_path)
    model.routed.save_pretrained(tmp_path)
    assert "adapter_model.safetensors" in {each.name for each in tmp_path.iterdir()}
    assert not list((tmp_path / "adapter").glob("*.safetensors"))
    assert load_file(tmp_path / "adapter_model.safetensors")


def test_importing_firstlab_waits_for_nothing():
    program = "import sys, firstlab; assert not {'torch', 'transformers', 'peft', 'lm_eval'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_registration_follows_the_import_whichever_comes_first(tmp_path, monkeypatch):
    (tmp_path / "comes_later.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    seen = []
    waiting = dict.fromkeys(("json", "comes_later"), lambda module: seen.append((module.__name__, vars(module).copy())))
    monkeypatch.setattr(register, "_WAITING", waiting)
    register.register_when_imported()
    assert [name for name, _ in seen] == ["json"]
    importlib.import_module("comes_later")
    assert seen[1][0] == "comes_later" and seen[1][1]["value"] == 1 and not waiting


# Of transformers' GenerationTesterMixin, which its wheel leaves out: what applies to a routed model, said again. Left
# out are models built from a config with random weights, encoder-decoders, assisted, contrastive, DoLa and static-cache
# decoding, which routed decoding refuses, and compiled decoding, which the static cache is for.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_generate_returns_dictionaries_of_the_usual_shapes(routed, options):
    ids, mask = prompts()
    torch.manual_seed(0)
    out = routed.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, output_scores=True, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    rows = len(ids) * options.get("num_return_sequences", 1)
    beams = len(ids) * options.get("num_beams", options.get("num_return_sequences", 1))
    vocabulary = routed.config.vocab_size
    assert out.sequences.shape == (rows, ids.shape[1] + 4)
    assert [tuple(each.shape) for each in out.scores] == [(beams, vocabulary)] * 4
    assert [tuple(each.shape) for each in out.logits] == [(beams, vocabulary)] * 4
    assert isinstance(out.past_key_values, RoutedCache)
    torch.manual_seed(0)
    assert torch.equal(
        out.sequences, routed.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, **options)
    )


def test_generate_goes_on_from_its_own_cache(routed):
    ids, mask = prompts((6, 6, 6))
    whole = routed.generate(ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6)
    first = routed.generate(ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True)
    longer = torch.ones_like(first.sequences)
    rest = routed.generate(
        first.sequences, attention_mask=longer, past_key_values=first.past_key_values, max_new_tokens=3,
        min_new_tokens=3,
    )  # fmt: skip
    assert torch.equal(rest, whole)


def test_generate_from_embeddings_and_from_padded_prompts(routed):
    ids, mask = prompts()
    expected = routed.generate(ids, attention_mask=mask, max_new_tokens=4)
    embeds = routed.get_input_embeddings()(ids)
    assert torch.equal(
        routed.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4), expected[:, ids.shape[1] :]
    )
    alone = routed.generate(ids[1:2, 3:], max_new_tokens=4)
    assert torch.equal(alone[0, 9:], expected[1, 12 : 12 + alone.shape[1] - 9])


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}],
    ids=str,
)
def test_what_cannot_be_routed_is_refused(routed, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* cannot be used with routed decoding"):
        routed.generate(prompts()[0], max_new_tokens=2, **options)
