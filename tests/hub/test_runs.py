"""Runs become cards, uploads and plain smaller models, and start from a user's own adapter or GGUF file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from firstlab.bench.models import Models
from firstlab.hub.__main__ import main
from firstlab.hub.export import export, without_layers
from firstlab.hub.modeling import FirstlabForCausalLM
from firstlab.hub.source import open_run
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import FixedRoutes, PrunedRoutes
from firstlab.model.settings import RouterSettings
from firstlab.model.storage import load_base
from firstlab.run.experiment import Experiment
from firstlab.run.load import dense_counterpart, load_run
from support.models import prompts, tiny_model
from support.tiny_run import composed, overrides


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory) -> dict[str, Path]:
    """A run of FiRST with its dense counterpart, and one that removes layers."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    options = {
        "first": ["method.target_skip=0.25", "phases=[router,evaluate]"],
        "sleb": ["method=sleb", "method.target_skip=0.25", "method.skip_prefill=true"],
    }
    for name, more in options.items():
        config, method = composed(*overrides(tiny_model_dir, folder, *more))
        run = Experiment(config, method)
        run.run()
        found[name] = run.directory
        if name == "first":
            Experiment(*dense_counterpart(config)).run()
    return found


def test_the_card_says_what_the_record_says(runs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(runs["first"] / "router")
    assert isinstance(model, FirstlabForCausalLM)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    record = json.loads((runs["first"] / "result.json").read_text())
    [dense] = [path for path in runs["first"].parent.glob("none*/result.json")]
    for found in (record["variants"]["router"], json.loads(dense.read_text())["variants"]["base"]):
        score = found["metrics"][found["primary_metric"]]
        ratio, skip = found["timing"]["tpot_ratio"], found["skip"]["skip_rate"]
        quality = f"{score['value']:.1f} [{score['low']:.1f}, {score['high']:.1f}]"
        assert f"| {quality} | {100 * skip:.1f} % | {ratio:.2f} |" in card.text
    assert record["device"] in card.text and f"Task: {record['data']}, 7 test prompts" in card.text
    assert card.data.tags == ["layer-skipping", "firstlab"]  # no LoRA yet


def test_fixed_routes_are_not_loaded_without_their_run(runs):
    with pytest.raises(ValueError, match="fixed routes and no routers; .* use python -m firstlab.generate"):
        AutoModelForCausalLM.from_pretrained(runs["sleb"] / "lora")


def test_an_export_is_a_plain_model_with_the_text_that_was_measured(runs, tmp_path, capsys):
    out = tmp_path / "plain"
    main(["export", f"run={runs['sleb']}", f"out={out}"])
    removed = [index for index, run in enumerate(open_run(runs["sleb"]).routes.ran) if not run]
    assert len(removed) == 1 and f"without layers {removed[0]}" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert type(plain) is LlamaForCausalLM and plain.config.num_hidden_layers == 3
    ids, mask = prompts()
    trained = load_run(runs["sleb"], "router_lora").model.merge_and_unload()
    routes = open_run(runs["sleb"]).routes
    assert isinstance(routes, PrunedRoutes)
    expected = trained.generate(ids, mask, routes=routes, max_new_tokens=6)
    assert torch.equal(plain.generate(ids, attention_mask=mask, max_new_tokens=6), expected)
    assert AutoTokenizer.from_pretrained(out)("the dog").input_ids
    card = ModelCard.load(out / "README.md")
    record = json.loads((runs["sleb"] / "result.json").read_text())["variants"]["router_lora"]
    assert f"| {record['metrics'][record['primary_metric']]['value']:.1f} [" in card.text
    assert card.data.tags == ["layer-skipping", "firstlab"] and f"Layers {removed} of the base" in card.text
    assert "import firstlab" not in card.text


def test_an_export_whose_prefill_would_differ_is_refused(runs, tmp_path):
    source = open_run(runs["sleb"])
    skipping = source._replace(routes=FixedRoutes(source.routes.ran))
    message = "its prefill runs every layer and only decode skips.*method.skip_prefill=true"
    with pytest.raises(ValueError, match=message):
        export(skipping, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2", "phi3"])
def test_layers_are_removed_from_any_architecture(architecture, tmp_path):
    ids, mask = prompts()
    ran = torch.tensor([True, True, False, True, False, True])
    expected = RouterAugmentedLM(tiny_model(architecture)).generate(
        ids, mask, routes=PrunedRoutes(ran), max_new_tokens=6
    )
    without_layers(tiny_model(architecture), [2, 4]).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain.generate(ids, attention_mask=mask, max_new_tokens=6), expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export run=first out=new", "routes change from prompt to prompt"),
        ("export run=sleb variant=base out=new", "this variant runs every layer"),
        ("export run=sleb out=.", "is not an empty folder"),
        ("export run=nowhere out=new", "is no run directory"),
        ("export run=sleb", "out= is missing"),
        ("push run=first", "repo= is missing"),
        ("publish run=first", "'publish' is unknown: choose export, push or lm_eval"),
    ],
)
def test_refusals_are_one_message(runs, tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    named = [f"run={runs.get(each[4:], each[4:])}" if each.startswith("run=") else each for each in words.split()]
    with pytest.raises(SystemExit) as stopped:
        main(named)
    assert stopped.value.code == 2
    [line] = [each for each in capsys.readouterr().err.splitlines() if "error" in each]
    assert line.startswith("error: ") and re.search(message, line)
    assert not (tmp_path / "new").exists()


QUICK = ["method.target_skip=0.25", "evaluation.tpot_prompts=0", "evaluation.limit=3"]


def user_lora(base: Path, folder: Path, **options) -> torch.nn.Module:
    """An adapter as PEFT saves it, which changes the base a lot."""
    torch.manual_seed(1)
    settings = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_both_phases_start_from_a_users_adapter(tiny_model_dir, tmp_path, options):
    peft_model = user_lora(tiny_model_dir, tmp_path / "mine", **options)
    run = Experiment(*composed(*overrides(tmp_path / "mine", tmp_path / "runs", *QUICK)))
    record = run.run()
    assert set(record["variants"]) == {"router", "router_lora"}
    ids, _ = prompts()
    dense = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        expected = peft_model(ids).logits
        base, router, lora = (load_run(run.directory, each).model for each in ("base", "router", "router_lora"))
        for model in (base, router):
            torch.testing.assert_close(model(ids, objective="decode_consistent", routes=dense).logits, expected)
    assert not router.has_lora and lora.has_lora
    assert {"lora_A", "lora_B"} == {name.split(".")[-3] for name, _ in lora.lm.named_parameters() if "lora_" in name}
    # The folder alone knows that its base is the adapter's folder.
    again = RouterAugmentedLM.from_pretrained(run.directory / "lora").eval()
    assert torch.equal(again.generate(ids, max_new_tokens=4), lora.generate(ids, max_new_tokens=4))


def test_a_merged_lora_is_a_plain_model(tiny_model_dir, tmp_path):
    merged = user_lora(tiny_model_dir, tmp_path / "mine", use_dora=True).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    ids, _ = prompts()
    with pytest.raises(ValueError, match="is DoRA, of which transformers loses the magnitudes: .* merge=True"):
        load_base(tmp_path / "mine")
    with torch.no_grad():
        found = load_base(tmp_path / "mine", merge=True)
        torch.testing.assert_close(found(ids).logits, load_base(tmp_path / "merged")(ids).logits)


def write_gguf(model_dir: Path, folder: Path) -> Path:
    """The tiny Llama as a GGUF file of 16-bit weights, with its tokenizer beside it."""
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'firstlab[gguf]'")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    config = model.config
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        weights = value.numpy()
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:  # as llama.cpp orders the halves of rotary pairs
                weights = weights.reshape(heads, 2, -1, weights.shape[1]).swapaxes(1, 2).reshape(weights.shape)
        kept = weights if weights.ndim == 1 else weights.astype(np.float16)
        writer.add_tensor(names.get_name(name, (".weight",)), kept)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def test_a_run_from_a_gguf_file(tiny_model_dir, tmp_path):
    folder = write_gguf(tiny_model_dir, tmp_path / "gguf")
    options = [*QUICK, "model.gguf_file=tiny.gguf"]
    run = Experiment(*composed(*overrides(folder, tmp_path / "runs", *options)))
    assert set(run.run()["variants"]) == {"router", "router_lora"}
    ids, _ = prompts()
    with torch.no_grad():
        found = load_run(run.directory, "base").model.lm(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(tiny_model_dir)(ids).logits
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-2)
    cpu = torch.device("cpu")
    timed = Models.load(str(folder), RouterSettings(), random_init=False, device=cpu, gguf_file="tiny.gguf")
    with torch.no_grad():
        assert torch.equal(timed.plain(ids).logits, found)
    model = RouterAugmentedLM.from_pretrained(run.directory / "lora", gguf_file="tiny.gguf").eval()
    trained = load_run(run.directory, "router_lora").model
    assert torch.equal(model.generate(ids, max_new_tokens=4), trained.generate(ids, max_new_tokens=4))


def test_gguf_without_its_package_names_the_extra(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("firstlab.config.schema.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=r"gguf_file='x\.gguf' needs .* pip install 'firstlab\[gguf\]'"):
        composed(*overrides(tiny_model_dir, tmp_path, "model.gguf_file=x.gguf"))
