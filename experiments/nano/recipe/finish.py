"""Saves the trained model as a Hugging Face folder, with its scores: greedy answers to held-out prompts."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from firstlab.data.task import Task
from firstlab.metrics import MetricResult, evaluate_predictions
from recipe.settings import EvaluationConfig, RecipeConfig, device_of, weight_settings
from recipe.training import Progress, build_model, load_checkpoint

log = logging.getLogger(__name__)


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


def save_model(config: RecipeConfig, work: Path, folder: Path) -> Progress:
    """Writes the trained model as a Hugging Face folder: weights in bfloat16, to be loaded as float32.

    Raises:
        ValueError: Training has not reached its last step.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    model = build_model(config.model, tokenizer, config.seed)
    progress = load_checkpoint(work / "checkpoint.pt", model, [])
    if progress.step < config.training.steps:
        raise ValueError(f"work_dir={work} has {progress.step} of {config.training.steps} steps: train on")
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # bfloat16 saves half the space; computing in it would only be slower on a CPU.
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
    return progress


def finish(config: RecipeConfig, tasks: dict[str, Task], work: Path) -> dict[str, Any]:
    """Saves the trained model, scores the saved one, and puts it in place with its record, `nano.json`."""
    folder, output = work / "model", Path(config.output_dir)
    progress = save_model(config, work, folder)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    torch.nn.Module.to(model, device_of(config))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    scores: dict[str, Any] = {}
    for name, task in tasks.items():
        if not config.tasks[name].scored:
            continue
        scores[name] = score(model, tokenizer, task, config.evaluation)
        log.info("%s: %s", name, {metric: round(v["value"], 2) for metric, v in scores[name]["all"].items()})
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": config.model.num_hidden_layers,
        "training_tokens": progress.tokens,
        "steps": progress.step,
        "wall_time_s": round(progress.seconds),
        "held_out_scores": scores,
        "recipe": weight_settings(config),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / "nano.json").write_text(json.dumps(record, indent=1) + "\n")
    output.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, output / f"{file.name}.part")
        os.replace(output / f"{file.name}.part", output / file.name)
    return record
