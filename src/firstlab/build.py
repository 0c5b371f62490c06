"""What a configuration names becomes an object here: task, data, model, trained run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from firstlab import targets
from firstlab.config import PHASES, ExperimentConfig, PhaseConfig, RouterConfig, TrainerConfig, read
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.task import Task
from firstlab.methods.base import Method
from firstlab.methods.none import Dense
from firstlab.model import RouterAugmentedLM, RouterSettings, load_tokenizer

_ASSETS = Path(__file__).resolve().parent / "assets"
BUNDLED = {"bundled:nano": _ASSETS / "nano"}
#: Models of which only the config is bundled, with sizes as published.
ARCHITECTURES = {
    "meta-llama/Meta-Llama-3-8B": _ASSETS / "llama3_8b",
    "meta-llama/Llama-3.2-3B": _ASSETS / "llama32_3b",
}


def model_path(path: str, config_only: bool = False) -> str:
    """Hub id or folder behind `model.path`; with `config_only` the folder may hold no weights."""
    return str((BUNDLED | ARCHITECTURES if config_only else BUNDLED).get(path, path))


def build_task(config: ExperimentConfig) -> Task:
    """The task of a configuration; `data.root` is handed to tasks that read files."""
    node = dict(config.data.task)
    if "root" in node:
        node["root"] = config.data.root
    elif config.data.root is not None:
        raise ValueError(
            f"data.root={config.data.root!r}: data={config.data.name} is generated and reads no files, or a mixture, "
            "whose parts have their own root"
        )
    task = targets.build(node, "data.task")
    if not isinstance(task, Task):
        raise ValueError(f"data.task._target_={node['_target_']!r} is not a firstlab task")
    return task


def build_data(config: ExperimentConfig) -> PromptDataModule:
    """The data module of a configuration, with the lengths of phase 2."""
    data = config.data
    return PromptDataModule(
        build_task(config),
        load_tokenizer(model_path(config.model.path)),
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
    options: dict[str, Any] = {"dtype": config.model.dtype}
    if config.model.revision is not None:
        options["revision"] = config.model.revision
    if config.model.attn_implementation is not None:
        options["attn_implementation"] = config.model.attn_implementation
    torch.manual_seed(config.seed)
    settings = RouterSettings(config.router.input_norm, config.router.threshold)
    model = RouterAugmentedLM.from_pretrained(path, settings=settings, **options)
    check_lengths(config, model.max_positions)
    model.gradient_checkpointing = config.trainer.gradient_checkpointing
    model.loss_chunk = config.trainer.loss_chunk
    on_gpu = config.trainer.accelerator == "gpu"
    return model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else "cpu").eval()


def check_lengths(config: ExperimentConfig, max_positions: int | None) -> None:
    """Raises ValueError if the lengths of the data go beyond the model's table of positions."""
    data = config.data
    new_tokens = max(data.max_new_tokens, config.evaluation.tpot_tokens)
    for option, length in (
        ("data.max_length_router", data.max_length_router),
        ("data.max_length_lora", data.max_length_lora),
        ("data.max_prompt_length plus new tokens", data.max_prompt_length + new_tokens),
    ):
        if max_positions is not None and length > max_positions:
            raise ValueError(f"{option}={length} exceeds the {max_positions} positions of the model; lower it")


class TrainedRun(NamedTuple):
    """A trained run as it stands on disk."""

    config: ExperimentConfig
    method: Method
    model: RouterAugmentedLM
    variant: str


def load_run(directory: Path, variant: str | None, overrides: dict[str, str] | None = None) -> TrainedRun:
    """Configuration, method, model and variant of a trained run.

    Args:
        directory: Run directory.
        variant: base, base_lora, router or router_lora; None takes the most trained one there is.
        overrides: Keys that replace the saved ones; `data` names a file of conf/data.

    Raises:
        ValueError: Not a run directory, the variant was not trained, or a device is asked for that is not there.
    """
    config, method = read(directory / "config.yaml", overrides)
    check_device(config.trainer)
    products = (
        {"base": None, "base_lora": "lora"}
        if method.name == "none"
        else {"base": None, "router": "router" if method.trains_routers else None, "router_lora": "lora"}
    )
    if variant is None:
        variant = [name for name, part in products.items() if part is None or (directory / part).is_dir()][-1]
    if variant not in products:
        raise ValueError(f"variant={variant!r} is unknown; choose one of {', '.join(products)}")
    part = products[variant]
    if part is not None and not (directory / part).is_dir():
        raise ValueError(f"variant={variant}: {directory} has no trained {part}; train it, or choose another variant")
    path = model_path(config.model.path) if part is None else directory / part
    return TrainedRun(config, method, load_model(config, path), variant)


def dense_counterpart(config: ExperimentConfig) -> tuple[ExperimentConfig, Method]:
    """The same settings with method=none: what skipping is compared with."""
    dense = Dense()
    node = {"_target_": f"{Dense.__module__}.{Dense.__qualname__}"}
    directory = (
        None if config.run_dir is None else str(Path(config.run_dir).with_name(Path(config.run_dir).name + "-none"))
    )
    phases = list(PHASES) if "lora" in config.phases else ["evaluate"]
    # What only routers use is left at its default, so that every method shares one dense run.
    counterpart = replace(
        config,
        method=node,
        router=RouterConfig(),
        router_phase=PhaseConfig(),
        run_dir=directory,
        init_from=None,
        phases=phases,
        overwrite=False,
    )
    return counterpart, dense
