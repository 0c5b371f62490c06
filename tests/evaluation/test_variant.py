"""Responses through the decode engine are those of transformers' `generate`, with their skips and after a kill."""

from __future__ import annotations

import json
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GenerationConfig

from firstlab.config.build import build_data, load_model
from firstlab.config.schema import ExperimentConfig
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import PromptRows
from firstlab.evaluation.decoding import Decoder
from firstlab.evaluation.predictions import Prediction, generate_predictions, source_of
from firstlab.evaluation.timing import Stopwatch
from firstlab.evaluation.variant import evaluate_variant
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lora import lora_layers
from firstlab.model.routes import EarlyExit, FixedRoutes, PrunedRoutes, Routes, StepRoutes
from firstlab.model.settings import LoraSettings
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
    decoder = Decoder(model, data, options, seed=5, routes=routes)
    return generate_predictions(decoder, file=file, source=source_of(model, routes), progress_bar=False)


def evaluate(setting, folder: Path, routes: Routes | None, seed: int = 0, **evaluation: object) -> dict[str, Any]:
    config, data, model = setting
    options, source = replace(config.evaluation, **evaluation), source_of(model, routes)
    return evaluate_variant(model, data, options, folder, "router", routes, source, seed, progress_bar=False)


SCHEDULE = torch.tensor([[True, True, True, True], [True, True, False, True], [True, False, False, True]])
RULES: dict[str, Routes | None] = {
    "routers": None,
    "one": FixedRoutes(torch.tensor([True, False, True, True])),
    "each": FixedRoutes(torch.rand(LIMIT, 4, generator=torch.Generator().manual_seed(1)) > 0.4),
    "steps": StepRoutes(SCHEDULE),
    "early exit": EarlyExit(0.02),
    "pruned": PrunedRoutes(torch.tensor([True, True, False, True])),
}


def test_a_greedy_evaluation_goes_on_where_memory_runs_out(setting, tmp_path: Path, monkeypatch, capsys) -> None:
    options = {"batch_size": 8, "tpot_prompts": 0}
    whole = evaluate(setting, tmp_path / "whole", None, **options)

    def scarce(original: Any) -> Any:
        def run(self: RouterAugmentedLM, *args: Any, **kwargs: Any) -> Any:
            if len(args[0] if args else kwargs["input_ids"]) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(self, *args, **kwargs)

        return run

    for name in ("generate", "forward"):
        monkeypatch.setattr(RouterAugmentedLM, name, scarce(getattr(RouterAugmentedLM, name)))
    halved = evaluate(setting, tmp_path / "halved", None, **options)
    said = [(tmp_path / each / "router.jsonl").read_text() for each in ("whole", "halved")]
    assert said[0] == said[1] and halved["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
    assert "going on with 3 rows" in capsys.readouterr().err
    with pytest.raises(torch.OutOfMemoryError):  # drawn tokens depend on the prompts beside them
        evaluate(setting, tmp_path / "drawn", None, do_sample=True, **options)


def test_each_part_of_a_mixture_has_its_rates(setting, tmp_path: Path) -> None:
    parts = [each.part for each in setting[1].test]
    skipped = [0 if part == "mini_qa" else 1 + index % 2 for index, part in enumerate(parts)]
    ran = torch.ones(LIMIT, 4, dtype=torch.bool)
    for row, count in enumerate(skipped):
        ran[row, 1 : 1 + count] = False
    record = evaluate(setting, tmp_path, FixedRoutes(ran), tpot_prompts=0)
    steps = unpack(record["examples"]["response_tokens"]) - 1
    for part, found in record["skip"]["by_part"].items():
        own = [index for index, each in enumerate(parts) if each == part]
        assert found["n"] == len(own)
        assert found["skip_rate"] == pytest.approx(sum(skipped[i] for i in own) / 4 / len(own))
        over_tokens = sum(skipped[i] / 4 * steps[i] for i in own) / sum(steps[i] for i in own)
        assert found["skip_rate_by_token"] == pytest.approx(over_tokens)
    assert record["skip"]["by_part"]["mini_qa"]["skip_rate_by_token"] == 0


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
def test_a_killed_evaluation_goes_on(setting, tmp_path: Path, capsys, sample: bool) -> None:
    options = {"decoder": "engine", "do_sample": sample, "temperature": 1.5}
    whole = predict(setting, tmp_path / "router.jsonl", None, **options)
    part = tmp_path / "router.0.part"
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == LIMIT
    part.write_text("".join(lines[:5]) + lines[5][:20], encoding="utf-8")
    assert predict(setting, tmp_path / "router.jsonl", None, **options) == whole
    again = part.read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["index"] for line in again} == set(range(LIMIT))
    # Greedy, no prompt is answered twice; a batch of drawn tokens is drawn again as a whole.
    assert len(again) == LIMIT or sample
    part.touch()
    assert predict(setting, tmp_path / "router.jsonl", None, **options) == whole  # nothing left to do
    assert len(part.read_text(encoding="utf-8").splitlines()) == LIMIT  # nobody twice
    assert not capsys.readouterr().err
    assert not sample or predict(setting, tmp_path / "greedy.jsonl", None, decoder="engine") != whole


def changed(line: str, **values: object) -> str:
    return json.dumps({**json.loads(line), **values}) + "\n"


@pytest.mark.parametrize(
    "harm",
    [
        lambda line: line[: len(line) // 2] + "\n",
        lambda line: "\n",
        lambda line: "null\n",
        lambda line: "[" * 100_000 + "\n",
        lambda line: changed(line, text="something else"),
        lambda line: changed(line, index=LIMIT),
        lambda line: changed(line, skipped=None),
        lambda line: changed(line, foreign=1),
        lambda line: "\0\ufffd" + line,
    ],
    ids=["torn", "empty", "null", "brackets", "text", "index", "type", "key", "bytes"],
)
def test_a_wrong_line_in_the_middle_is_named_and_made_again(setting, tmp_path: Path, capsys, harm) -> None:
    file, part = tmp_path / "router.jsonl", tmp_path / "router.0.part"
    whole = predict(setting, file, None, decoder="engine")
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    part.write_text("".join([*lines[:3], harm(lines[3]), *lines[4:], lines[0]]), encoding="utf-8")
    assert predict(setting, file, None, decoder="engine") == whole
    assert f"warning: {part}: 1 lines, the first of them line 4, are damaged" in capsys.readouterr().err
    assert sorted(part.read_text(encoding="utf-8").splitlines(keepends=True)) == sorted(lines)


def test_predictions_of_another_evaluation_are_not_mixed_in(setting, tmp_path: Path, capsys) -> None:
    config, data, model = setting
    part = tmp_path / "router.0.part"
    other_model = deepcopy(model)
    torch.nn.init.normal_(other_model.lm.get_output_embeddings().weight, std=0.4)
    whole = predict(setting, tmp_path / "router.jsonl", None)
    foreign = part.read_text(encoding="utf-8")
    other_tests = deepcopy(data)
    other_tests.test = [replace(example, source=f"{example.source} too") for example in data.test]
    shorter = deepcopy(data)
    shorter.max_new_tokens = 3
    for given, name, routes, options in (
        ((config, other_tests, model), "router", None, {}),
        ((config, shorter, model), "router", None, {}),
        ((config, data, other_model), "router", None, {}),
        (setting, "router", RULES["each"], {}),
        (setting, "router", None, {"do_sample": True}),
        (setting, "base", None, {}),
    ):
        expected = predict(given, tmp_path / "apart" / f"{name}.jsonl", routes, **options)
        (tmp_path / f"{name}.0.part").write_text(foreign, encoding="utf-8")
        capsys.readouterr()
        assert predict(given, tmp_path / f"{name}.jsonl", routes, **options) == expected
        assert f"{LIMIT} lines, the first of them line 1, are damaged or of an evaluation" in capsys.readouterr().err
        (tmp_path / "apart" / f"{name}.0.part").unlink()
    part.write_text(foreign, encoding="utf-8")
    assert predict(setting, tmp_path / "router.jsonl", None) == whole


def test_the_source_of_predictions_is_weights_settings_and_routes(setting, tmp_path: Path) -> None:
    config, _, model = setting
    lora = deepcopy(model)
    lora.add_lora(LoraSettings())
    lora.save_pretrained(tmp_path)

    def changed_model(change) -> RouterAugmentedLM:
        other = RouterAugmentedLM.from_pretrained(tmp_path, base=config.model.path)
        other.load_state_dict(lora.state_dict())
        with torch.no_grad():
            change(other)
        return other

    name, adapter = next((n, p) for n, p in lora.lm.named_parameters() if "lora_B" in n)
    sources = [source_of(lora, routes) for routes in RULES.values()]
    for change in (
        lambda x: x.lm.get_input_embeddings().weight.mul_(1.001),
        lambda x: x.routers.weight[1, 3].add_(1e-5),
        lambda x: x.lm.get_parameter(name)[0, 0].add_(1e-5),
        lambda x: setattr(x.routers, "settings", replace(x.routers.settings, threshold=0.4)),
        lambda x: next(lora_layers(x.lm)).scaling.update(default=3.0),
        lambda x: setattr(x.lm.generation_config, "eos_token_id", 77),
        lambda x: setattr(x.lm.config, "rms_norm_eps", 0.1),
    ):
        sources.append(source_of(changed_model(change), None))
    assert len(set(sources)) == len(sources) == 13 and adapter.numel() > 1
    assert source_of(changed_model(lambda x: None), None) == source_of(lora, None)  # wherever it was loaded from


HOSTILE = {
    "repetition_penalty": 1.6,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": [300, 301],
    "begin_suppress_tokens": [302],
    "bad_words_ids": [[303]],
    "min_length": 40,
    "min_new_tokens": 5,
    "length_penalty": 3.0,
    "num_beams": 4,
    "do_sample": True,
    "top_p": 0.1,
    "top_k": 3,
    "min_p": 0.4,
    "typical_p": 0.3,
    "temperature": 3.0,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (1, 1.5),
    "renormalize_logits": True,
    "max_length": 3,
    "use_cache": False,
    "prompt_lookup_num_tokens": 3,
}


@pytest.mark.parametrize("sample", [False, True])
def test_what_the_models_folder_says_moves_no_score(setting, tmp_path: Path, sample: bool) -> None:
    _, _, model = setting
    options = {"do_sample": sample, "tpot_prompts": 1, "perplexity": False, "temperature": 1.5, "top_k": 0}
    own, found = model.lm.generation_config, {}
    try:
        for name, hostile in (("plain", {}), ("hostile", HOSTILE)):
            model.lm.generation_config = deepcopy(own)
            model.lm.generation_config.update(**hostile)
            for decoder in ("generate", "engine"):
                folder = tmp_path / name / decoder
                record = evaluate(setting, folder, None, decoder=decoder, **options)
                found[name, decoder] = (folder / "router.jsonl").read_text(encoding="utf-8")
                in_force = {"decoder": decoder, "do_sample": sample, "top_p": 1.0, "num_beams": 1}
                assert in_force.items() <= record["decoding"].items()
                assert record["decoding"]["ignored"].keys() == hostile.keys() - {"use_cache"}
                assert yaml.safe_load(yaml.safe_dump(record)) == json.loads(json.dumps(record))
                assert model.lm.generation_config.repetition_penalty == hostile.get("repetition_penalty")
    finally:
        model.lm.generation_config = own
    assert found["hostile", "generate"] == found["plain", "generate"]
    assert found["hostile", "engine"] == found["plain", "engine"]
    assert sample or found["plain", "engine"] == found["plain", "generate"]


@pytest.mark.parametrize("decoder", ["generate", "engine"])
def test_every_stop_token_of_the_model_ends_a_response(setting, tmp_path: Path, decoder: str) -> None:
    config, data, model = setting
    before = predict(setting, tmp_path / "before.jsonl", None, decoder=decoder)
    longest = max(before, key=lambda each: each.new_tokens)
    eos = data.tokenizer.eos_token_id
    rows = PromptRows(data.task, data.test, data.tokenizer, data.max_prompt_length)
    prompt = torch.tensor([rows[longest.index].prompt])
    said = model.generate(prompt, max_new_tokens=longest.new_tokens, eos_token_id=eos)[0, prompt.shape[1] :].tolist()
    stop = said[3]
    own, model.lm.generation_config = model.lm.generation_config, GenerationConfig(eos_token_id=[stop])
    try:
        assert Decoder(model, data, config.evaluation, seed=0, routes=None).settings["stop_tokens"] == sorted(
            {stop, eos}
        )
        after = predict(setting, tmp_path / "after.jsonl", None, decoder=decoder)[longest.index]
    finally:
        model.lm.generation_config = own
    first = said.index(stop)
    assert after.new_tokens == first + 1 < longest.new_tokens
    # The token that ends a response is not part of its text, also where it is no special token.
    assert after.text == data.tokenizer.decode(said[:first], skip_special_tokens=True).strip()


def test_what_times_a_variant_is_recorded(setting, tmp_path: Path) -> None:
    found = {}
    for decoder in ("generate", "engine"):
        found[decoder] = evaluate(setting, tmp_path / decoder, None, decoder=decoder, limit=2)
        timing = found[decoder]["timing"]
        assert timing["decoder"] == decoder and timing["tpot_s"] > 0 and timing["measurements"] == 1
    assert found["generate"]["metrics"] == found["engine"]["metrics"]
    assert found["generate"]["perplexity"] == found["engine"]["perplexity"]


@pytest.mark.parametrize("measured", [True, False])
def test_references_weigh_the_rate_by_token_with_or_without_perplexity(setting, tmp_path: Path, measured: bool) -> None:
    data = setting[1]
    record = evaluate(setting, tmp_path, RULES["each"], seed=5, perplexity=measured, tpot_prompts=0)
    lengths = [len(data.tokenizer(each.references[0], add_special_tokens=False)["input_ids"]) for each in data.test]
    # The first token is prefill's, EOS is one.
    steps, skipped = torch.tensor(lengths), (~RULES["each"].ran).float().mean(1)
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
    with pytest.raises(ValueError, match="evaluation.num_beams=2 needs evaluation.decoder=generate"):
        composed("evaluation.decoder=engine", "evaluation.num_beams=2")
    with pytest.raises(ValueError, match="evaluation.decoder='vllm' is not allowed: choose one of generate, engine"):
        composed("evaluation.decoder=vllm")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_times_since_the_start(device: str) -> None:
    scores = torch.zeros(1, 5, device=device)
    watch, began = Stopwatch(torch.device(device)), time.perf_counter()
    for _ in range(2):
        time.sleep(0.02)
        assert watch(torch.zeros(1, 1, dtype=torch.long), scores) is scores
    first, second = watch.times
    assert 0.02 <= first < first + 0.02 <= second <= time.perf_counter() - began + 0.005


@pytest.mark.gpu
def test_a_gpu_notes_its_own_time() -> None:
    x = torch.randn(4096, 4096, device="cuda")
    (x @ x).sum().item()
    watch, began = Stopwatch(torch.device("cuda")), time.perf_counter()
    for _ in range(200):
        x = x @ x / 4096
    watch(x, x)
    host = time.perf_counter() - began  # the products have been asked for, not made
    assert watch.times[0] > 2 * host


def test_what_is_on_the_host() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.note()
    watch.note()
    assert 0 <= watch.times[0] <= watch.times[1] < 1
