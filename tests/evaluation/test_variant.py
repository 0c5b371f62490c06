"""Responses through the decode engine are those of transformers' `generate`, with their skips and after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firstlab.config.build import build_data, load_model
from firstlab.config.schema import ExperimentConfig
from firstlab.data.datamodule import PromptDataModule
from firstlab.evaluation.variant import Prediction, evaluate_variant, generate_predictions
from firstlab.model import EarlyExit, PrunedRoutes, RouterAugmentedLM, Routes, StepRoutes
from firstlab.run.experiment import Experiment
from firstlab.store.results import unpack
from support.models import random_routers, tiny_model
from support.tiny_run import composed, overrides

LIMIT = 13


@pytest.fixture(scope="module")
def setting(tiny_model_dir: Path, tmp_path_factory) -> tuple[ExperimentConfig, PromptDataModule, RouterAugmentedLM]:
    """Prompts of four tasks with lengths of their own, and a model whose responses differ in length."""
    extra = ["data=mini_mixture", f"evaluation.limit={LIMIT}", "data.max_new_tokens=14", "data.max_prompt_length=400"]
    config, _ = composed(*overrides(tiny_model_dir, tmp_path_factory.mktemp("runs"), *extra))
    data = build_data(config)
    data.setup("fit")
    torch.manual_seed(3)
    model = load_model(config, tiny_model_dir).eval()
    for parameter in model.lm.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    random_routers(model)
    # Some responses end before their limit.
    model.lm.get_output_embeddings().weight.data[data.tokenizer.eos_token_id] *= 3
    return config, data, model


def predict(setting, file: Path, routes: Routes | None, **evaluation: object) -> list[Prediction]:
    config, data, model = setting
    options = replace(config.evaluation, **{"batch_size": 3, **evaluation})
    return generate_predictions(model, data, options, file, routes, 5, "", False)


SCHEDULE = torch.tensor([[True, True, True, True], [True, True, False, True], [True, False, False, True]])
RULES: dict[str, Routes | None] = {
    "routers": None,
    "one": torch.tensor([True, False, True, True]),
    "each": torch.rand(LIMIT, 4, generator=torch.Generator().manual_seed(1)) > 0.4,
    "steps": StepRoutes(SCHEDULE),
    "early exit": EarlyExit(0.02),
    "pruned": PrunedRoutes(torch.tensor([True, True, False, True])),
}


@pytest.mark.parametrize("name", RULES)
def test_the_engine_says_what_generate_says(setting, tmp_path: Path, name: str) -> None:
    weights = {key: value.clone() for key, value in setting[2].state_dict().items()}
    strides = [parameter.stride() for parameter in setting[2].parameters()]
    slow = predict(setting, tmp_path / "slow.jsonl", RULES[name])
    fast = predict(setting, tmp_path / "fast.jsonl", RULES[name], decoder="engine")
    assert [replace(p, shares=None) for p in fast] == [replace(p, shares=None) for p in slow]
    for one, other in zip(slow, fast, strict=True):
        assert one.skip_shares(4) == pytest.approx(other.skip_shares(4))
    assert len({p.new_tokens for p in slow}) > 1
    # The model is as it was, also how its weights lie: what is trained on from here rounds as without an evaluation.
    assert all(torch.equal(value, weights[key]) for key, value in setting[2].state_dict().items())
    assert [parameter.stride() for parameter in setting[2].parameters()] == strides


@pytest.mark.parametrize("decoder", ["generate", "engine"])
def test_drawing_from_all_tokens(setting, tmp_path: Path, decoder: str) -> None:
    options = {"decoder": decoder, "do_sample": True, "temperature": 1.5}
    one = predict(setting, tmp_path / "one.jsonl", None, top_k=1, **options)
    greedy = predict(setting, tmp_path / "greedy.jsonl", None, decoder=decoder)
    assert [each.text for each in one] == [each.text for each in greedy]
    every = predict(setting, tmp_path / "every.jsonl", None, top_k=0, **options)
    vocabulary = setting[2].lm.config.vocab_size
    assert every == predict(setting, tmp_path / "again.jsonl", None, top_k=vocabulary, **options) != one


@pytest.mark.parametrize("sample", [False, True])
def test_a_killed_evaluation_goes_on(setting, tmp_path: Path, sample: bool) -> None:
    options = {"decoder": "engine", "do_sample": sample, "temperature": 1.5}
    whole = predict(setting, tmp_path / "whole.jsonl", None, **options)
    part = tmp_path / "whole.0.part"
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == LIMIT
    (tmp_path / "killed.0.part").write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
    assert predict(setting, tmp_path / "killed.jsonl", None, **options) == whole
    again = (tmp_path / "killed.0.part").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["index"] for line in again} == set(range(LIMIT))
    # Greedy, no prompt is answered twice; a batch of drawn tokens is drawn again as a whole.
    assert len(again) == LIMIT or sample
    assert predict(setting, tmp_path / "whole.jsonl", None, **options) == whole  # nothing left to do
    assert not sample or predict(setting, tmp_path / "greedy.jsonl", None, decoder="engine") != whole


def test_what_times_a_variant_is_recorded(setting, tmp_path: Path) -> None:
    config, data, model = setting
    found = {}
    for decoder in ("generate", "engine"):
        options = replace(config.evaluation, decoder=decoder, limit=2)
        result = evaluate_variant(model, data, options, tmp_path / decoder, "router", None, 0, False)
        found[decoder] = result
        timing = result["timing"]
        assert timing["decoder"] == decoder and timing["tpot_s"] > 0 and timing["measurements"] == 1
    assert found["generate"]["metrics"] == found["engine"]["metrics"]
    assert found["generate"]["perplexity"] == found["engine"]["perplexity"]


@pytest.mark.parametrize("measured", [True, False])
def test_references_weigh_the_rate_by_token_with_or_without_perplexity(setting, tmp_path: Path, measured: bool) -> None:
    config, data, model = setting
    options = replace(config.evaluation, perplexity=measured, tpot_prompts=0)
    record = evaluate_variant(model, data, options, tmp_path, "router", RULES["each"], 5, False)
    lengths = [len(data.tokenizer(each.references[0], add_special_tokens=False)["input_ids"]) for each in data.test]
    steps, skipped = torch.tensor(lengths), (~RULES["each"]).float().mean(1)  # the first token is prefill's, EOS is one
    assert record["skip"]["skip_rate_by_token"] == pytest.approx(float((skipped * steps).sum() / steps.sum()))
    assert unpack(record["examples"]["response_tokens"]).tolist() == [length + 1 for length in lengths]
    assert ("perplexity" in record) is measured


def test_a_model_that_the_engine_does_not_know_stops_before_training(tmp_path: Path, tiny_model_dir: Path) -> None:
    lm = tiny_model("gpt2")
    lm.save_pretrained(tmp_path / "gpt2")
    for file in tiny_model_dir.glob("token*"):
        (tmp_path / "gpt2" / file.name).write_bytes(file.read_bytes())
    given = overrides(tmp_path / "gpt2", tmp_path, "evaluation.decoder=engine", "method=none")
    lengths = [f"data.max_{name}=100" for name in ("length_router", "length_lora", "prompt_length")]
    run = Experiment(*composed(*[each for each in given if not each.startswith("method.")], *lengths))
    with pytest.raises(ValueError, match=r"evaluation.decoder=engine: GPT2LMHeadModel.*evaluation.decoder=generate"):
        run.run()
    assert not (run.directory / "checkpoints").exists()


def test_a_run_is_itself_with_and_without_the_choice() -> None:
    plain, _ = composed()
    chosen, _ = composed("evaluation.decoder=generate")
    engine, _ = composed("evaluation.decoder=engine")
    assert plain.hash() == chosen.hash() != engine.hash()
    assert plain.identity()["evaluation"]["decoder"] == "generate"
    with pytest.raises(ValueError, match="evaluation.num_beams=2 is not allowed: 1 with evaluation.decoder=engine"):
        composed("evaluation.decoder=engine", "evaluation.num_beams=2")
    with pytest.raises(ValueError, match="evaluation.decoder='vllm' is not allowed: choose one of generate, engine"):
        composed("evaluation.decoder=vllm")
