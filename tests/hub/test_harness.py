"""The real lm-evaluation-harness over tasks of our own: multiple choice, perplexity, generation."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'firstlab[lm-eval]'")
import lm_eval
from hydra import compose, initialize_config_dir
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from firstlab.config.compose import conf_dir
from firstlab.hub.__main__ import main
from firstlab.model.lm import RouterAugmentedLM
from firstlab.run.experiment import Experiment
from firstlab.store import results
from firstlab.tables.analysis import harness
from firstlab.tables.cells import Cells, load
from firstlab.tables.records import read
from support.models import random_routers
from support.tiny_run import composed, overrides

TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: 0
doc_to_choice: [" the small dog sleeps", " das rote Haus steht am alten Fluss", " x"]
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
# Its interval is drawn by processes of its own.
WORDS = """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " by the old river"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
TEXTS = ["the red house stands by", "by the old river", "der kleine Hund", "the dog sleeps by the old red house", "a"]


def write_tasks(folder: Path) -> Path:
    """The tasks as YAML files, over texts in a file."""
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": each, "target": "x"}) + "\n" for each in TEXTS))
    for name, text in {**TASKS, "words": WORDS}.items():
        source = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: "{data}"}}}}\ntest_split: test\n'
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> TaskManager:
    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def saved(tiny_model_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("routed")
    model = RouterAugmentedLM.from_pretrained(tiny_model_dir)
    random_routers(model)
    model.save_pretrained(folder)
    return folder


def evaluate(tasks: TaskManager, model: str, batch_size: int = 2, **arguments):
    return lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(TASKS), task_manager=tasks, batch_size=batch_size, device="cpu",
        bootstrap_iters=0, log_samples=True,
    )  # fmt: skip


def said(results) -> dict:
    """Metrics and every answer."""
    answers = {name: [each["resps"] for each in found] for name, found in results["samples"].items()}
    metrics = {name: {k: v for k, v in found.items() if "," in k} for name, found in results["results"].items()}
    return {"answers": answers, "metrics": metrics}


def test_dense_is_the_harness_own_model_to_the_last_digit(tasks, tiny_model_dir, saved):
    expected = said(evaluate(tasks, "hf", pretrained=str(tiny_model_dir)))
    plain = evaluate(tasks, "firstlab", pretrained=str(tiny_model_dir))
    assert said(plain) == expected
    dense = evaluate(tasks, "firstlab", pretrained=str(saved), skip_rate=0)
    assert said(dense) == expected
    assert dense["config"]["firstlab"]["skip_rate"] == 0 and dense["config"]["firstlab"]["skip_rate_asked"] == 0
    routed = evaluate(tasks, "firstlab", pretrained=str(saved))
    assert said(routed) != expected
    note = routed["config"]["firstlab"]
    assert note["skip_rate"] > 0 and sum(note["routes"].values()) == note["rows"] == 3 * 5 + 5 + 5
    assert note["skip_rate"] == pytest.approx(sum(note["skip_rate_per_layer"]) / 4)
    json.dumps(note)


def by_decode(model: RouterAugmentedLM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """A continuation's log-likelihood, token by token through the cache."""
    cache, total, greedy = model.new_cache(), 0.0, True
    tokens = context
    with torch.no_grad():
        for target in continuation:
            scores = model(torch.tensor([tokens]), past_key_values=cache).logits[0, -1].log_softmax(-1)
            total, greedy = total + float(scores[target]), greedy and int(scores.argmax()) == target
            tokens = [target]
    return total, greedy


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def test_continuations_are_scored_as_decode_would(saved):
    model = RouterAugmentedLM.from_pretrained(saved).eval()
    harness = get_model("firstlab")(pretrained=str(saved), batch_size=3)
    ids = AutoTokenizer.from_pretrained(saved)("the small red dog sleeps by the old river!").input_ids
    # One text, cut in several places; the padding token at the end of some.
    cuts = [(ids[:k], ids[k:end]) for k in (1, 3, 5) for end in (6, len(ids))] + [
        (ids[:4] + [0], [0, 0, 5]),
        (ids, [7]),
    ]
    found = harness._loglikelihood_tokens([(("", ""), *each) for each in cuts], disable_tqdm=True)
    for (total, greedy), each in zip(found, cuts, strict=True):
        expected, is_greedy = by_decode(model, *each)
        assert total == pytest.approx(expected, abs=1e-4) and greedy == is_greedy
    note = harness.get_model_info()["firstlab"]
    assert note["scored_tokens_in_decode"] == sum(len(continuation) - 1 for _, continuation in cuts)


def test_generation_is_that_of_generate(saved):
    model, tokenizer = RouterAugmentedLM.from_pretrained(saved).eval(), AutoTokenizer.from_pretrained(saved)
    harness = get_model("firstlab")(pretrained=str(saved), batch_size=2)
    asked = {"until": ["zzz"], "max_gen_toks": 5, "do_sample": False}
    answers = harness.generate_until(requests("generate_until", *((text, asked) for text in TEXTS)), disable_tqdm=True)
    for text, answer in zip(TEXTS, answers, strict=True):
        batch = tokenizer(text, return_tensors="pt")
        new = model.generate(**batch, max_new_tokens=5)[0, batch["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True)
    lengths = [len(tokenizer(each).input_ids) for each in TEXTS]
    assert harness.get_model_info()["firstlab"]["rows"] == len(lengths)


def test_runs_of_any_method(tasks, tiny_model_dir, tmp_path, capsys):
    arguments = ["method=sleb", "method.target_skip=0.25", "phases=[lora]", "compare_with_base=false"]
    run = Experiment(*composed(*overrides(tiny_model_dir, tmp_path, *arguments)))
    run.run()
    results = evaluate(tasks, "firstlab", pretrained=str(run.directory))
    note = results["config"]["firstlab"]
    assert note["skip_rate"] == 0.25 and note["unique_routes"] == 1
    dense = evaluate(tasks, "firstlab", pretrained=str(run.directory), variant="base")
    assert said(dense) == said(evaluate(tasks, "hf", pretrained=str(tiny_model_dir)))
    assert said(dense) != said(results)


def test_the_command_line_writes_results_that_become_a_table(saved, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    command = f"lm_eval --model firstlab --model_args pretrained={saved} --tasks writing,words --device cpu"
    main([*command.split(), "--include_path", str(write_tasks(tmp_path)), "--output_path", str(tmp_path / "out")])
    assert "KeyboardInterrupt" not in capfd.readouterr().err  # of the processes that draw for the interval
    [file] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["config"]["firstlab"]["rows"] == 2 * len(TEXTS)

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = load(compose("tables"))
    library = read([str(tmp_path)])
    table = harness(Cells(config, library))
    [row], texts = table.rows, [column.full_name for column in table.columns]
    assert texts[-2:] == ["writing exact_match", "words perplexity"] and not library.warnings and not table.missing
    perplexity, error = (found["results"]["words"][f"perplexity{each},none"] for each in ("", "_stderr"))
    assert row[-1].value == perplexity and row[-1].detail.startswith(f"[{perplexity - 1.96 * error:.3f}, ")
    assert row[-2].plain == "0.0 [0.0, 43.4]" and row[5].value == 100 * found["config"]["firstlab"]["skip_rate"]
    results.add(tmp_path / "packed", {"mine": found})
    assert [harness(Cells(config, read([str(tmp_path / each)]))).rows for each in ("packed", "out")] == [table.rows] * 2
    summary = (tmp_path / "packed" / "summary.csv").read_text()
    assert f"\nmine,,,,,,,{row[5].value / 100:.5g},words perplexity,{perplexity:.5g}," in summary
    [empty] = harness(Cells(config, read([str(saved)]))).missing
    assert empty.command.startswith("python -m firstlab.hub lm_eval --model firstlab --model_args pretrained=RUN")
    found["config"]["firstlab"] |= {"model": "another", "skip_rate": "much"}
    file.write_text(json.dumps(found))
    assert "config.firstlab.skip_rate='much' is not a number" in read([str(tmp_path / "out")]).warnings[0]


def test_options_that_a_run_answers_itself_are_refused(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="dtype='bfloat16': the run directory .* says that itself; leave it out"):
        get_model("firstlab")(pretrained=str(tmp_path), dtype="bfloat16")


def test_without_the_harness_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(SystemExit):
        main(["lm_eval", "--model", "firstlab"])
    assert "error: lm_eval needs the harness: pip install 'firstlab[lm-eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_rate": 0.25}, "skip_rate=0.25"),
        ({"skip_rate": 1.5}, "skip_rate=1.5 must be at least 0 and below 1"),
        ({"skip_rate": "much"}, "skip_rate='much' must be a number"),
        ({"variant": "router"}, "variant='router' is for run directories"),
        ({"peft": "x"}, "peft='x' is of the model hf"),
        ({"skiprate": 0.25}, "skiprate=0.25 is no option of this model: did you mean skip_rate"),
        ({"pretrained": ""}, "pretrained= is missing"),
        ({"trust_remote_code": True}, "firstlab runs no code from the hub"),
    ],
    ids=str,
)
def test_refusals_name_option_and_way_out(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        get_model("firstlab")(**{"pretrained": str(saved), **arguments})
