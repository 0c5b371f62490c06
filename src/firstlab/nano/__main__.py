"""Entry point; see the package's docstring."""

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
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from firstlab.config import instantiate
from firstlab.config.command_line import command
from firstlab.config.compose import settings
from firstlab.data.task import Task
from firstlab.nano.config import NanoConfig, check, device_of, recipe
from firstlab.nano.scoring import score
from firstlab.nano.text import encode_corpus, frame_lines, train_tokenizer, training_examples
from firstlab.nano.training import Progress, build_model, load_checkpoint, train_in_processes
from firstlab.store.files import write_atomically

log = logging.getLogger(__name__)

ConfigStore.instance().store(name="nano_schema", node=NanoConfig)


def prepare(config: NanoConfig, tasks: dict[str, Task], work: Path) -> None:
    """Writes tokenizer and corpus into `work` unless they are there already.

    Raises:
        ValueError: What is there was made by another recipe.
    """
    path = work / "recipe.json"
    if path.exists():
        if json.loads(path.read_text()) != recipe(config):
            raise ValueError(
                f"work_dir={config.work_dir} holds a run of another recipe (see recipe.json there): choose another "
                "work_dir, or delete this one to start anew"
            )
        return
    work.mkdir(parents=True, exist_ok=True)
    pools = {name: training_examples(task, config.tasks[name].count, config.seed) for name, task in tasks.items()}
    scored = [name for name in tasks if config.tasks[name].scored]
    seen = [example for name in scored for example in pools[name][: config.tokenizer_examples]]
    tokenizer = train_tokenizer(
        (text for e in seen for text in (e.source, e.question, e.references[0]) if text),
        (line for task in tasks.values() for line in frame_lines(task)),
        config.model.vocab_size,
    )
    tokenizer.model_max_length = config.model.max_position_embeddings
    tokenizer.save_pretrained(work / "tokenizer")
    corpus = encode_corpus(tokenizer, [(task, pools[name]) for name, task in tasks.items()], config.training.max_length)
    corpus.save(work / "corpus.npz")
    log.info("%d examples, %.1f M tokens, vocabulary %d", len(corpus.lengths()), len(corpus.ids) / 1e6, len(tokenizer))
    write_atomically(path, json.dumps(recipe(config), indent=1) + "\n")


def save_model(config: NanoConfig, work: Path, folder: Path) -> Progress:
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


def finish(config: NanoConfig, tasks: dict[str, Task], work: Path) -> dict[str, Any]:
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
        "recipe": recipe(config),
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


def main(raw: DictConfig) -> None:
    """Prepares, trains, saves and scores; goes on where an earlier call was stopped."""
    OmegaConf.resolve(raw)
    config = settings(raw, NanoConfig)
    check(config)
    tasks = {name: instantiate.build(chosen.task, f"tasks.{name}.task", Task) for name, chosen in config.tasks.items()}
    work = Path(config.work_dir)
    prepare(config, tasks, work)
    train_in_processes(config, work)
    finish(config, tasks, work)


if __name__ == "__main__":
    command("nano", main)
