"""Build the task, data and model that a configuration names."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from firstlab.config import instantiate
from firstlab.config.command_line import during
from firstlab.config.schema import ExperimentConfig, TrainerConfig
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import pad_id
from firstlab.data.task import Task
from firstlab.metrics import PRIMARY_METRIC
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.lora import check_lora
from firstlab.model.storage import ModelUnavailableError, load_base_config, load_tokenizer, read_config

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
BUNDLED = {"bundled:nano": _ASSETS / "nano"}
#: Models of which only the config is bundled, with sizes as published.
ARCHITECTURES = {"meta-llama/Meta-Llama-3-8B": _ASSETS / "llama3_8b", "meta-llama/Llama-3.2-3B": _ASSETS / "llama32_3b"}


def model_path(path: str, config_only: bool = False) -> str:
    """Hub id or folder behind `model.path`; with `config_only` the folder may hold no weights."""
    return str((BUNDLED | ARCHITECTURES if config_only else BUNDLED).get(path, path))


def build_task(config: ExperimentConfig) -> Task:
    """The task of a configuration; `data.root` is handed to tasks that read files."""
    node = dict(config.data.task)
    if "root" in node:
        node["root"] = config.data.root
    elif config.data.root is not None:
        raise ValueError(f"data.root={config.data.root!r}: {config.data.name} is generated or a mixture; leave it null")
    task: Task = instantiate.build(node, "data.task", Task)  # type: ignore[type-abstract]
    for each in task.parts.values() or [task]:
        kind = getattr(each, "kind", None)
        if kind not in PRIMARY_METRIC:
            known = ", ".join(PRIMARY_METRIC)
            raise ValueError(f"data.task: the kind of {type(each).__name__} is {kind!r}; choose one of {known}")
    return task


def build_data(config: ExperimentConfig) -> PromptDataModule:
    """The data module of a configuration, with the lengths of phase 2."""
    data = config.data
    return PromptDataModule(
        build_task(config),
        load_tokenizer(model_path(config.model.path), config.model.revision, config.model.gguf_file),
        train_size=data.train_size,
        val_size=data.val_size,
        test_size=min(filter(None, (data.test_size, config.evaluation.limit)), default=None),
        seed=data.split_seed,
        max_length=data.max_length_lora,
        max_prompt_length=data.max_prompt_length,
        max_new_tokens=data.max_new_tokens,
        eval_batch_size=config.evaluation.batch_size,
        num_workers=data.num_workers,
        bucket=data.bucket,
    )


def check_test_set(data: PromptDataModule) -> None:
    """Raises ValueError if there is nothing to evaluate on."""
    if not data.test:
        raise ValueError(f"data.task: {type(data.task).__name__} has no test examples; leave evaluate out of phases")


def check_lora_targets(config: ExperimentConfig) -> None:
    """Raises ValueError if phase 2 would adapt linear maps that the model does not have; loads no weights."""
    model, path = config.model, model_path(config.init_from or config.model.path)
    if "lora" in config.phases:
        with suppress(ModelUnavailableError):  # loading it says what is wrong, or knows more kinds of folders
            base = load_base_config(path, model.revision, model.attn_implementation, model.gguf_file)
            check_lora(base, config.lora)


def check_device(trainer: TrainerConfig) -> None:
    """Raises ValueError if the run asks for GPUs that this machine does not have."""
    if trainer.accelerator != "gpu":
        return
    if not torch.cuda.is_available():
        raise ValueError("trainer.accelerator='gpu' but this machine has no CUDA device; use trainer=cpu")
    if trainer.devices > torch.cuda.device_count():
        raise ValueError(f"trainer.devices={trainer.devices} but this machine has {torch.cuda.device_count()} GPU(s)")


def load_model(config: ExperimentConfig, path: str | Path) -> RouterAugmentedLM:
    """A model on the configured device, in eval mode; fresh routers start from the run's seed."""
    given = {key: getattr(config.model, key) for key in ("dtype", "revision", "attn_implementation", "gguf_file")}
    options = {key: value for key, value in given.items() if value is not None}
    torch.manual_seed(config.seed)
    saved, base_path = read_config(path), model_path(config.model.path)
    own_base = config.init_from is not None or (Path(path) / "base").is_dir() or read_config(base_path) is not None
    # Routers go on the configured base, wherever that was when they were saved.
    base = None if saved is None or own_base else base_path
    on_gpu = config.trainer.accelerator == "gpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.set_float32_matmul_precision("high" if config.trainer.tf32 else "highest")
    with during(f"the loading of {path}"):
        model = RouterAugmentedLM.from_pretrained(path, settings=config.router, base=base, merge=True, **options)
        model = model.to(device)
    check_lengths(config, model.max_positions)
    model.gradient_checkpointing = config.trainer.gradient_checkpointing
    model.loss_chunk = config.trainer.loss_chunk
    model.cross_entropy = config.trainer.cross_entropy
    return model.eval()


def check_vocabulary(config: ExperimentConfig, tokenizer: PreTrainedTokenizerBase, model: RouterAugmentedLM) -> None:
    """Raises ValueError if the tokenizer gives tokens that the model has no embedding for."""
    embedding: Any = model.lm.get_input_embeddings()
    rows = embedding.weight.shape[0]
    # Some models carry markers for images that text never has.
    markers = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    markers -= {tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id(tokenizer)}
    if any(index >= rows and index not in markers for index in tokenizer.get_vocab().values()):
        sizes = f"its tokenizer has {len(tokenizer)} entries, but the model embeds {rows}"
        raise ValueError(f"model.path={config.model.path!r}: {sizes}; give the model its own tokenizer")


def check_lengths(config: ExperimentConfig, max_positions: int | None) -> None:
    """Raises ValueError if the lengths of the data go beyond the model's table of positions."""
    data, new_tokens = config.data, max(config.data.max_new_tokens, config.evaluation.tpot_tokens)
    for option, length in {
        "data.max_length_router": data.max_length_router,
        "data.max_length_lora": data.max_length_lora,
        "data.max_prompt_length plus new tokens": data.max_prompt_length + new_tokens,
    }.items():
        if max_positions is not None and length > max_positions:
            raise ValueError(f"{option}={length} exceeds the {max_positions} positions of the model; lower it")
