"""Measure runs with lm-evaluation-harness on tasks like HellaSwag and ARC, and on perplexity, made of bundled examples.

    python experiments/any_speed/harness.py out=experiments/any_speed RUN=0,0.15,0.25,0.35 OTHER_RUN

Each run directory is measured at the skip rates behind it, or at its own; the records join those in `out`.
"""

from __future__ import annotations

import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lm_eval
from datasets import Dataset

from firstlab.data.mini_qa import MiniQA
from firstlab.data.mini_summarization import MiniSummarization
from firstlab.data.mini_translation import MiniTranslation
from firstlab.data.task import Example, Task
from firstlab.hub.harness import FirstlabLM
from firstlab.store import results

CONTINUED = (MiniTranslation("en-de"), MiniTranslation("en-zh"), MiniSummarization())
#: Test prompts of each of these tasks, and questions.
CONTINUATIONS, QUESTIONS = 100, 200
#: Wrong choices beside the right one.
WRONG = 3


class FirstlabOnPrompts(FirstlabLM):
    """Splits a text where its prompt ends. The harness would move the prompt's last line break to the response, which
    these models have seen as one token with what stands before it."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)


def _pieces(text: str) -> list[str]:
    """Words, or letters where words are not set apart."""
    return text.split(" ") if " " in text else list(text)


def continuations(task: Task) -> Iterator[dict[str, Any]]:
    """The reference among copies that have one word replaced, by another that follows the same word elsewhere."""
    followers: dict[str, set[str]] = defaultdict(set)
    for example in task.test():
        words = _pieces(example.references[0])
        for first, second in pairwise(words):
            followers[first].add(second)
    for example in task.test()[:CONTINUATIONS]:
        words, draw = _pieces(example.references[0]), random.Random(example.id)
        joint = " " if " " in example.references[0] else ""
        copies = [
            joint.join([*words[: place + 1], other, *words[place + 2 :]])
            for place, first in enumerate(words[:-1])
            for other in sorted(followers[first] - {words[place + 1]})
        ]
        choices = [example.references[0], *draw.sample(copies, min(WRONG, len(copies)))]
        yield {"prompt": task.prompt(example), "choices": choices, "response": choices[0]}


def questions(task: Task) -> Iterator[dict[str, Any]]:
    """The answer among those to other questions: first those that stand in the passage, then to similar questions."""
    for example in task.test()[:QUESTIONS]:
        asked = set(example.question.split())

        def tempting(other: Example, example: Example = example, asked: set[str] = asked) -> tuple[bool, int, str]:
            return (
                other.references[0] not in example.source, -len(asked & set(other.question.split())), other.id
            )  # fmt: skip

        answers = [each.references[0] for each in sorted(task.test(), key=tempting)]
        wrong = [each for each in dict.fromkeys(answers) if each not in example.references]
        choices = [example.references[0], *wrong[:WRONG]]
        yield {"prompt": task.prompt(example), "choices": choices, "response": choices[0]}


def _task(name: str, documents: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return {
        "task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)}, "test_split": "test",
        "doc_to_text": "{{prompt}}", "target_delimiter": "", **options,
    }  # fmt: skip


def tasks(tokenizer: Any) -> list[dict[str, Any]]:
    """Choose the continuation; choose the answer; the references' perplexity, where all responses count the same."""

    def per_token(document: dict[str, Any], answers: list[tuple[float, bool]]) -> dict[str, float]:
        tokens = tokenizer(document["response"], add_special_tokens=False)["input_ids"]
        return {"perplexity": answers[0][0] / len(tokens)}

    continued = [each for task in CONTINUED for each in continuations(task)]
    asked = list(questions(MiniQA()))
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": 0}
    choice["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
    scored = {"output_type": "loglikelihood", "doc_to_target": "{{response}}", "process_results": per_token}
    scored["metric_list"] = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    return [
        _task("bundled_hellaswag", continued, **choice),
        _task("bundled_arc", asked, **choice),
        _task("bundled_perplexity", continued + asked, **scored),
    ]


def main(arguments: list[str]) -> None:
    """Parse, measure, record."""
    out, runs = "", []
    for each in arguments:
        name, _, value = each.partition("=")
        if name == "out":
            out = value
        else:
            runs += [(Path(name), float(rate) if rate else None) for rate in value.split(",")]
    if not out or not runs:
        sys.exit("error: say out=FOLDER and at least one run directory; see the top of this file")
    for run, rate in runs:
        model = FirstlabOnPrompts(str(run), rate, batch_size=16)
        found = lm_eval.simple_evaluate(
            model=model, tasks=tasks(model.tokenizer), bootstrap_iters=1000, log_samples=False
        )  # fmt: skip
        told = {key: found["config"][key] for key in ("firstlab", "limit", "num_fewshot") if key in found["config"]}
        kept = {key: found[key] for key in ("results", "n-samples", "versions")}
        name = f"{run.parent.name}--{run.name}--harness{'' if rate is None else f'-{rate:g}'}"
        print(name, *(f"{task}: {values}" for task, values in found["results"].items()), sep="\n  ", flush=True)
        results.add(Path(out), {name: {"config": told, **kept, "lm_eval_version": lm_eval.__version__}})


if __name__ == "__main__":
    main(sys.argv[1:])
