"""Saves the trained model as a Hugging Face folder, with its scores."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from firstlab.data.task import Task
from recipe.scoring import score
from recipe.settings import RecipeConfig, device_of, weight_settings
from recipe.training import Progress, build_model, load_checkpoint

log = logging.getLogger(__name__)


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
