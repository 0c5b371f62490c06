"""What the finished model can do: greedy answers to held-out prompts, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from firstlab.data.task import Task
from firstlab.metrics import MetricResult, evaluate_predictions
from recipe.settings import EvaluationConfig


@torch.inference_mode()
def greedy_responses(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], config: EvaluationConfig
) -> list[str]:
    """The model's greedy answer to each prompt, in order; prompts of similar length share a batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: dict[int, str] = {}
    for start in range(0, len(order), config.batch_size):
        rows = order[start : start + config.batch_size]
        batch = tokenizer([prompts[i] for i in rows], return_tensors="pt", padding=True).to(model.device)
        output = cast(Any, model).generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        responses.update(zip(rows, texts, strict=True))
    return [responses[i] for i in range(len(prompts))]


def score(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, task: Task, config: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """Every metric of the task with its interval on the test set ("all"), values alone on each difficulty level."""
    examples = task.test()[: config.examples or None]
    responses = greedy_responses(model, tokenizer, [task.prompt(e) for e in examples], config)

    def metrics(level: int | None) -> dict[str, MetricResult]:
        pairs = [(r, e) for r, e in zip(responses, examples, strict=True) if level in (None, e.difficulty)]
        return evaluate_predictions(
            task.kind,
            [response for response, _ in pairs],
            [e.references for _, e in pairs],
            [e.source for _, e in pairs],
            task.target_language,
            resamples=1000 if level is None else 1,
        )

    scores: dict[str, dict[str, Any]] = {"all": {name: result.to_dict() for name, result in metrics(None).items()}}
    levels = sorted({e.difficulty for e in examples})
    if len(levels) > 1:
        for level in levels:
            scores[f"difficulty {level}"] = {
                name: {"value": result.value, "n": result.n} for name, result in metrics(level).items()
            }
    return scores
