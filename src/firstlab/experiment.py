"""One run from configuration to `result.json`: phase 1, phase 2, evaluation; finished parts are never done twice."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch.loggers import Logger
from torch import Tensor

from firstlab import results
from firstlab.config import PHASES, ExperimentConfig, PhaseConfig, RouterConfig, build, load_dict, read
from firstlab.data.batching import batch_count
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.encoding import TrainingRows, collate_training
from firstlab.data.task import Task
from firstlab.evaluation import check_metrics, evaluate_variant, rank
from firstlab.files import write_atomically
from firstlab.methods.base import Method
from firstlab.methods.first import First
from firstlab.methods.none import Dense
from firstlab.methods.sleb import greedy_order
from firstlab.model import LoraSettings, RouterAugmentedLM, RouterSettings, load_tokenizer
from firstlab.tracking import JsonLinesLogger, log_evaluation
from firstlab.training.calibration import loss_under_routes, start_routers
from firstlab.training.modules import LoRACompensationModule, OptimizerSettings, RouterModule, RoutingObjective
from firstlab.training.trainer import FitSettings, fit_phase, read_checkpoint

BUNDLED = {"bundled:nano": Path(__file__).resolve().parent / "assets" / "nano"}


def model_path(path: str) -> str:
    """Hub id or folder behind `model.path`."""
    return str(BUNDLED.get(path, path))


class Experiment:
    """One run.

    Args:
        config: Checked configuration.
        method: Its method.

    Raises:
        ValueError: The run directory belongs to another configuration, or a device is asked for that is not there.
    """

    def __init__(self, config: ExperimentConfig, method: Method) -> None:
        self.config, self.method = config, method
        self.directory = config.directory(method)
        self._check_device()
        self._prepare_directory()

    # -- before anything expensive --

    def _check_device(self) -> None:
        trainer = self.config.trainer
        if trainer.accelerator == "gpu":
            if not torch.cuda.is_available():
                raise ValueError("trainer.accelerator='gpu' but this machine has no CUDA device; use trainer=cpu")
            if trainer.devices > torch.cuda.device_count():
                raise ValueError(
                    f"trainer.devices={trainer.devices} but this machine has {torch.cuda.device_count()} GPU(s)"
                )

    def _prepare_directory(self) -> None:
        file = self.directory / "config.yaml"
        if rank()[0] == 0:
            if self.config.overwrite and self.directory.exists():
                self._delete()
            if file.is_file():
                self._check_same(yaml.safe_load(file.read_text(encoding="utf-8")))
            elif self.directory.exists() and any(self.directory.iterdir()):
                raise ValueError(
                    f"run_dir={self.directory} is not empty and holds no config.yaml; choose another run_dir"
                )
            write_atomically(file, yaml.safe_dump(self.config.to_dict(), sort_keys=False, allow_unicode=True))
        _barrier()

    def _delete(self) -> None:
        if not (self.directory / "config.yaml").is_file():
            raise ValueError(
                f"overwrite=true: {self.directory} was not made by firstlab and is left alone; choose another run_dir"
            )
        shutil.rmtree(self.directory)

    def _check_same(self, saved: dict[str, Any]) -> None:
        old, new = _flat(load_dict(saved).identity()), _flat(self.config.identity())
        changed = [
            f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in sorted(old | new) if old.get(k) != new.get(k)
        ]
        if changed:
            raise ValueError(
                f"run directory {self.directory} belongs to another configuration ({'; '.join(changed[:6])}); "
                "choose another run_dir, or pass overwrite=true to delete it"
            )

    # -- the run --

    def run(self) -> dict[str, Any]:
        """All phases that are not done yet; returns the record that is in result.json."""
        finished = results.read(self.directory)
        if finished is not None and set(self._wanted_variants()) <= set(finished["variants"]):
            _say(f"{self.directory} is finished already")
            return finished
        start = time.perf_counter()
        L.seed_everything(self.config.seed, workers=True, verbose=False)
        self.data = build_data(self.config)
        self.data.setup("fit")
        if "evaluate" in self.config.phases:
            _ = self.data.test  # a wrong path or a malformed line stops here, not after the training
            check_metrics(self.data.task, self.config.evaluation)
        self.model = self._load_model()
        loggers = self._loggers()
        variants: dict[str, Any] = {}
        before, after = self._variant_names()

        routes = self._fixed_routes()
        if self.method.trains_routers:
            self._phase("router", loggers, routes)
        if before in self._wanted_variants():
            variants[before] = self._evaluate(before, routes)
        self._phase("lora", loggers, routes)
        if after in self._wanted_variants():
            self.model.merge_and_unload()
            variants[after] = self._evaluate(after, routes)
        record = {
            "method": self.method.name,
            "label": self.method.label,
            "level": self._level(),
            "model": self.config.model.name,
            "data": self.config.data.name,
            "directory": str(self.directory),
            "config_hash": self.config.hash(),
            "config": self.config.identity(),
            "seed": self.config.seed,
            "num_layers": self.model.num_layers,
            "variants": variants,
            "phases": {name: self._phase_record(name) for name in ("router", "lora")},
            "fixed_routes": None if routes is None else routes.tolist(),
            "wall_s": time.perf_counter() - start,
            "peak_memory_bytes": results.peak_memory_bytes(),
            **results.provenance(),
        }
        if rank()[0] == 0 and variants:
            self._join_predictions(list(variants))
            for logger in loggers:
                log_evaluation(logger, record, self.directory / "predictions.jsonl")
            results.write(self.directory, record)
        _barrier()
        return record

    def _variant_names(self) -> tuple[str, str]:
        return ("base", "base_lora") if self.method.name == "none" else ("router", "router_lora")

    def _wanted_variants(self) -> list[str]:
        """What the requested phases, together with what is on disk, let us evaluate."""
        if "evaluate" not in self.config.phases:
            return []
        before, after = self._variant_names()
        trained = "lora" in self.config.phases or (self.directory / "lora").is_dir()
        return [before, after] if trained else [before]

    def _join_predictions(self, names: list[str]) -> None:
        lines = []
        for name in names:
            for line in (self.directory / "predictions" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
                lines.append(json.dumps({"variant": name, **json.loads(line)}, ensure_ascii=False) + "\n")
        write_atomically(self.directory / "predictions.jsonl", "".join(lines))

    def _level(self) -> str:
        if self.method.target_skip is not None:
            return f"target {100 * self.method.target_skip:g} %"
        return f"α = {self.method.alpha:g}" if isinstance(self.method, First) else ""

    def _load_model(self) -> RouterAugmentedLM:
        config = self.config
        if config.init_from is not None:
            return load_model(config, model_path(config.init_from))
        if self.method.trains_routers and "router" not in config.phases and not (self.directory / "router").is_dir():
            raise ValueError(
                f"phases={config.phases} needs trained routers, and {self.directory} has none; "
                "set init_from to a saved model, or add router to phases"
            )
        return load_model(config, model_path(config.model.path))

    def _loggers(self) -> list[Logger]:
        loggers: list[Logger] = [JsonLinesLogger(self.directory / "metrics.jsonl")]
        if self.config.logger:
            loggers.append(build(dict(self.config.logger), "logger", save_dir=str(self.directory)))
        return loggers

    # -- phases --

    def _fixed_routes(self) -> Tensor | None:
        """Routes of a method without routers, found once and kept."""
        if self.method.trains_routers:
            return None

        def find(loss_of: Callable[[Tensor], float]) -> list[bool]:
            routes = self.method.fixed_routes(self.model.num_layers, loss_of)
            assert routes is not None
            return routes.tolist()

        return torch.tensor(self._calibrated("routes", find), dtype=torch.bool)

    def _calibrated(self, name: str, find: Callable[[Callable[[Tensor], float]], list[Any]]) -> list[Any]:
        """What a search over routes on training prompts found; done once, kept in NAME.json."""
        file = self.directory / f"{name}.json"
        if not file.is_file() and rank()[0] == 0:
            batches = self._calibration_batches(getattr(self.method, "calibration_prompts", 1))
            found = find(lambda routes: loss_under_routes(self.model, batches, routes))
            write_atomically(file, json.dumps(found) + "\n")
        _barrier()
        return json.loads(file.read_text(encoding="utf-8"))

    def _calibration_batches(self, prompts: int) -> list[dict[str, Tensor]]:
        rows = TrainingRows(self.data.task, self.data.train[:prompts], self.data.tokenizer, self.data.max_length)
        size = self.config.evaluation.batch_size
        batches = []
        for start in range(0, len(rows), size):
            chosen = [rows[i] for i in range(start, min(start + size, len(rows)))]
            batch = collate_training(chosen, pad=self.data.pad, loss_on="response")
            batches.append({k: v.to(self.model.device) for k, v in batch.items()})
        return batches

    def _start_routers(self) -> None:
        method = self.method
        if not isinstance(method, First) or method.start == "random":
            return
        _say(f"calibrating the routers' start ({method.start}) on {method.calibration_prompts} training prompts")
        layers, rate, order = self.model.num_layers, 0.0, []
        if method.start == "static":
            rate = method.target_skip or 0.0
            order = self._calibrated("start", lambda loss: greedy_order(layers, math.ceil(rate * layers), loss))
        start_routers(
            self.model, self._calibration_batches(method.calibration_prompts), order, rate, method.start_margin
        )

    def _phase(self, name: str, loggers: list[Logger], routes: Tensor | None) -> None:
        """Train a phase unless its product is there, and load the product; without either the model stays as it is."""
        product = self.directory / name
        if not product.is_dir():
            if name not in self.config.phases:
                return
            self._train(name, loggers, routes)
            if self.config.trainer.strategy == "fsdp":
                self._load_best(name)
            if rank()[0] == 0:
                temporary = self.directory / f".{name}.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                self.model.save_pretrained(temporary)
                temporary.rename(product)
            _barrier()
        self.model = load_model(self.config, product)

    def _load_best(self, name: str) -> None:
        """After sharded training: an unsharded model with the weights of the phase's best checkpoint."""
        router = self.directory / "router"
        start = router if name == "lora" and router.is_dir() else model_path(self.config.model.path)
        self.model = load_model(self.config, start)
        if name == "lora":
            self._add_lora()
        best = read_checkpoint(self.directory / "checkpoints" / name / "best.ckpt")["state_dict"]
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in best.items()}, strict=False)

    def _add_lora(self) -> None:
        lora = self.config.lora
        targets = None if lora.target_modules is None else tuple(lora.target_modules)
        torch.manual_seed(self.config.seed)
        self.model.add_lora(LoraSettings(lora.rank, lora.lora_alpha, lora.dropout, targets))

    def _train(self, name: str, loggers: list[Logger], routes: Tensor | None) -> None:
        config, method = self.config, self.method
        phase: PhaseConfig = config.router_phase if name == "router" else config.lora_phase
        data = self.data
        data.batch_size = phase.batch_size
        data.loss_on = "all" if phase.loss_on == "all" else "response"
        data.max_length = config.data.max_length_router if name == "router" else config.data.max_length_lora
        per_epoch = math.ceil(batch_count(len(data.train), phase.batch_size) / phase.accumulate)
        steps = min(phase.epochs * per_epoch, phase.max_steps or math.inf)
        data.total_batches = int(steps) * phase.accumulate
        optimizer = OptimizerSettings(phase.learning_rate, phase.weight_decay, phase.warmup_fraction, int(steps))
        objective = self._objective(name)
        module: RouterModule | LoRACompensationModule
        if name == "router":
            self._start_routers()
            module = RouterModule(self.model, objective, optimizer, config.seed)
        else:
            self._add_lora()
            if routes is not None:
                objective = replace(objective, target_skip=None, objective="decode_consistent")
            module = LoRACompensationModule(self.model, objective, optimizer, config.seed, routes)
        _say(f"phase {name}: {int(steps)} steps of {phase.batch_size * phase.accumulate} prompts, {method.label}")
        trainer = config.trainer
        settings = FitSettings(
            trainer.accelerator,
            trainer.devices,
            trainer.num_nodes,
            trainer.strategy,
            trainer.precision,
            phase.accumulate,
            int(steps),
            phase.gradient_clip,
            phase.validate_every,
            phase.checkpoint_every,
            phase.patience,
            trainer.progress_bar,
        )
        checkpoints = self.directory / "checkpoints" / name
        start = time.perf_counter()
        kept = fit_phase(module, data, settings, checkpoints, loggers, resume=config.ckpt == "last")
        record = {"steps": int(steps), "multiplier": module.multiplier, "seconds": time.perf_counter() - start, **kept}
        if rank()[0] == 0:
            write_atomically(self.directory / f"{name}.yaml", yaml.safe_dump(record, sort_keys=False))

    def _objective(self, name: str) -> RoutingObjective:
        method = self.method
        if not isinstance(method, First):
            return RoutingObjective(objective="decode_consistent")
        alpha = method.alpha
        if name == "lora":
            record = self._phase_record("router")
            if method.target_skip is not None and record is not None:
                alpha = record["multiplier"]
            alpha = alpha / 3 if method.beta is None else method.beta
        return RoutingObjective(
            method.objective,
            method.gate if name == "router" else method.lora_gate,
            method.pooled_tokens,
            alpha,
            method.target_skip,
            method.dual_rate,
            method.tolerance,
            method.lam,
        )

    def _phase_record(self, name: str) -> dict[str, Any] | None:
        file = self.directory / f"{name}.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _evaluate(self, name: str, routes: Tensor | None) -> dict[str, Any]:
        """Evaluate a variant once; its part of the record is kept on disk."""
        file = self.directory / "evaluation" / f"{name}.yaml"
        if not file.is_file():
            config = self.config
            variant = evaluate_variant(
                self.model,
                self.data,
                config.evaluation,
                self.directory / "predictions",
                name,
                routes,
                config.seed,
                config.trainer.progress_bar,
            )
            if rank()[0] == 0:
                write_atomically(file, yaml.safe_dump(variant, sort_keys=False))
            _barrier()
        return yaml.safe_load(file.read_text(encoding="utf-8"))


def build_task(config: ExperimentConfig) -> Task:
    """The task of a configuration; `data.root` is handed to tasks that read files."""
    node = dict(config.data.task)
    if "root" in node:
        node["root"] = config.data.root
    elif config.data.root is not None:
        raise ValueError(f"data.root={config.data.root!r}: data={config.data.name} is generated and reads no files")
    task = build(node, "data.task")
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
    )


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
    model.gradient_checkpointing = config.trainer.gradient_checkpointing
    on_gpu = config.trainer.accelerator == "gpu"
    return model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else "cpu").eval()


def load_run(
    directory: Path, variant: str | None, overrides: dict[str, str] | None = None
) -> tuple[ExperimentConfig, RouterAugmentedLM, str, Task]:
    """Configuration, model, variant and task of a trained run.

    Args:
        directory: Run directory.
        variant: base, base_lora, router or router_lora; None takes the most trained one there is.
        overrides: Keys that replace the saved ones; `data` names a file of conf/data.

    Raises:
        ValueError: Not a run directory, or the variant was not trained.
    """
    config, method = read(directory / "config.yaml", overrides)
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
    return config, load_model(config, path), variant, build_task(config)


def fixed_routes(directory: Path, variant: str, num_layers: int) -> Tensor | None:
    """Routes that a run without routers decodes with; all true for the base; None where routers decide."""
    if variant == "base":
        return torch.ones(num_layers, dtype=torch.bool)
    file = directory / "routes.json"
    return torch.tensor(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.rstrip("."): node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def _say(message: str) -> None:
    if rank()[0] == 0:
        print(message, flush=True)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


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
