"""Runs become cards, uploads and plain smaller models."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from firstlab.hub.__main__ import main
from firstlab.hub.export import export, without_layers
from firstlab.hub.modeling import FirstlabForCausalLM
from firstlab.hub.source import open_run
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import FixedRoutes, PrunedRoutes
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
