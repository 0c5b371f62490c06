"""One run from configuration to `result.json`: phase 1, phase 2, evaluation; finished parts are never done twice."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.loggers import Logger
from torch import Tensor

from firstlab.config import instantiate
from firstlab.config.build import (
    build_data,
    check_device,
    check_level,
    check_test_set,
    check_vocabulary,
    load_model,
    model_path,
)
from firstlab.config.schema import ExperimentConfig, PhaseConfig
from firstlab.data.batching import batch_count
from firstlab.data.task import Example
from firstlab.evaluation.variant import check_engine, check_metrics, evaluate_variant
from firstlab.methods.base import Method, Routes
from firstlab.methods.first import First
from firstlab.model import RouterAugmentedLM, routes_to_json
from firstlab.run.decisions import prompt_routes, shared_routes, static_routes
from firstlab.run.directory import CONFIG, check_directory, has_begun, variant_names, wanted_variants
from firstlab.run.load import check_start
from firstlab.run.loggers import (
    JsonLinesLogger,
    PhaseLogger,
    close_failed,
    close_logger,
    log_evaluation,
    logger_options,
    open_logger,
)
from firstlab.store import machine, results
from firstlab.store.files import claimed, remove_torn, write_atomically
from firstlab.store.ranks import barrier, rank
from firstlab.training.modules import (
    LoRACompensationModule,
    OnePhaseModule,
    OptimizerSettings,
    RouterModule,
    RoutingObjective,
)
from firstlab.training.prompt_set import PromptSet
from firstlab.training.router_start import calibrate_rate, start_phase_1
from firstlab.training.trainer import FitSettings, fit_phase, read_checkpoint


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
        self.directory = config.directory(method.label)
        # Where overwrite=true keeps what it replaces until the new run has started.
        self._replaced = self.directory.parent / f".{self.directory.name}.old"
        self._resumed = False
        config.model.check_trainable()
        trains = "lora" in config.phases or ("router" in config.phases and method.trains_routers)
        if trains and config.data.val_size == 0:
            raise ValueError("data.val_size=0: training keeps the weights that validate best, so give it at least 1")
        if "router" in config.phases:
            check_start(config.router, method)
        check_device(config.trainer)
        if rank()[0] == 0:
            check_directory(self.directory, self.config)

    def _prepare_directory(self) -> None:
        """Again what was checked at first: another process may have been here in between."""
        if rank()[0] == 0:
            check_directory(self.directory, self.config)
            if self.config.overwrite and self.directory.exists():
                if self._replaced.exists():  # by a start that was killed
                    shutil.rmtree(self.directory)
                else:
                    self.directory.rename(self._replaced)
            remove_torn(self.directory)
            self._resumed = has_begun(self.directory)
            (self.directory / results.FAILURE).unlink(missing_ok=True)
            text = yaml.safe_dump(self.config.located().to_dict(), sort_keys=False, allow_unicode=True)
            write_atomically(self.directory / CONFIG, text)
        barrier()

    # -- the run --

    def run(self) -> dict[str, Any]:
        """All phases that are not done yet; returns the record that is in result.json."""
        if rank()[0] > 0:
            return self._run()
        # Several processes of one run would time out waiting for each other, so those do not wait for another run.
        with claimed(self.directory, wait=rank()[1] == 1):
            try:
                return self._run()
            except Exception as error:
                if results.SWEEP_JOB in os.environ:
                    results.write_failure(self.directory, error)
                raise

    def _run(self) -> dict[str, Any]:
        self._prepare_directory()
        finished = results.read(self.directory)
        if finished is not None and set(wanted_variants(self.config, self.method)) <= set(finished["variants"]):
            _say(f"{self.directory} is finished already")
            return finished
        start = time.perf_counter()
        machine.reset_peak_memory()
        try:
            loggers = self._start()
        except BaseException:
            if rank()[0] == 0:
                self._undo_start()
            raise
        if rank()[0] == 0:
            shutil.rmtree(self._replaced, ignore_errors=True)
        variants: dict[str, Any] = {}
        before, after = variant_names(self.method)

        if self.method.trains_routers:
            self._phase("router", loggers)
        # Without LoRA, for which the routes are then fixed; of prompts decided one by one, this is the test set.
        routes = self._routes(self.data.test) if "evaluate" in self.config.phases else None
        if before in wanted_variants(self.config, self.method):
            variants[before] = self._evaluate(before, routes)
        self._phase("lora", loggers)
        if after in wanted_variants(self.config, self.method):
            self.model.merge_and_unload()
            variants[after] = self._evaluate(after, routes)
        record = {
            "method": self.method.name,
            "label": self.method.label,
            "level": self._level(),
            "rounding": self.method.rounding(self.model.num_layers),
            "note": self.config.note,
            "model": self.config.model.name,
            "data": self.config.data.name,
            "directory": str(self.directory),
            "config_hash": self.config.hash(),
            "config": self.config.identity(),
            "seed": self.config.seed,
            "num_layers": self.model.num_layers,
            "variants": variants,
            "phases": {name: self._phase_record(name) for name in ("router", "lora")},
            "fixed_routes": None if routes is None or self.method.per_prompt else routes_to_json(routes),
            # A resumed run's times are those since it was resumed.
            "resumed": self._resumed,
            "wall_s": time.perf_counter() - start,
            "peak_memory_bytes": machine.peak_memory_bytes(self.model.device),
            **machine.provenance(self.model.device),
        }
        if rank()[0] == 0 and variants:
            self._join_predictions(list(variants))
            for logger in loggers:
                log_evaluation(logger, record, self.directory / "predictions.jsonl")
            results.write(self.directory, record)
        if rank()[0] == 0:
            for logger in loggers:
                close_logger(logger)
        barrier()
        return record

    def _start(self) -> list[Logger]:
        """Loggers, data and model: what can be wrong with a command shows here, in little time."""
        initial = self.config.init_from
        if initial is not None and not Path(model_path(initial)).is_dir():
            raise ValueError(f"init_from={initial!r} does not exist; give the folder of a saved model")
        loggers = self._loggers()
        L.seed_everything(self.config.seed, workers=True, verbose=False)
        self.data = build_data(self.config)
        self.data.setup("fit")
        sizes = f"{len(self.data.train)} training and {len(self.data.val)} validation examples"
        if "evaluate" in self.config.phases:
            # A wrong path or a malformed line stops here, not after the training.
            check_test_set(self.data)
            if self.config.evaluation.perplexity:
                self.data.setup("test")
            self.data.setup("predict")
            sizes += f", {len(self.data.test)} to test"
            check_metrics(self.data.task, self.config.evaluation)
        _say(f"data {self.config.data.name}: {sizes}")
        self.model = self._load_model()
        check_level(self.config, self.model.num_layers)
        if "evaluate" in self.config.phases:
            check_engine(self.model, "evaluation.decoder", self.config.evaluation.decoder)
        check_vocabulary(self.config, self.data.tokenizer, self.model)
        return loggers

    def _undo_start(self) -> None:
        """After a start that failed the directory holds what it held before."""
        close_failed(self.config.logger)
        if self._replaced.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            self._replaced.rename(self.directory)
        elif not self._resumed:  # loggers may have written
            for each in self.directory.iterdir():
                if each.is_dir():
                    shutil.rmtree(each)
                elif each.name not in (CONFIG, results.FAILURE):
                    each.unlink()

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
            node = dict(self.config.logger)
            logger = instantiate.build(node, "logger", Logger, **logger_options(node, self.directory, self.method.name))
            if rank()[0] == 0:
                open_logger(logger)
                logger.log_hyperparams(self.config.identity())
            loggers.append(logger)
        return loggers

    # -- phases --

    def _routes(self, examples: Sequence[Example]) -> Routes | None:
        """The method's decision: [L] for all prompts, [N, L] for these, or None where routers decide."""
        if self.method.per_prompt:
            prompts = self._prompts(examples)
            return prompt_routes(self.directory, self.method, prompts, self.config.trainer.progress_bar)
        return shared_routes(self.directory, self.method, self._prompts(self.data.train))

    def _training_routes(self) -> Routes | None:
        """As `_routes`, for training prompts; only those that the phase comes to are decided."""
        if not self.method.per_prompt:
            return self._routes(self.data.train)
        used = self.data.trained_on()
        routes = torch.ones(len(self.data.train), self.model.num_layers, dtype=torch.bool)
        decided = self._routes([self.data.train[i] for i in used])
        assert isinstance(decided, Tensor)
        routes[used] = decided
        return routes

    def _prompts(self, examples: Sequence[Example]) -> PromptSet:
        room = self.config.trainer.prompt_cache_mib * 2**20
        return PromptSet(self.model, self.data, examples, self.config.evaluation.batch_size, room)

    def _phase(self, name: str, loggers: list[Logger]) -> None:
        """Train a phase unless its product is there, and load the product; without either the model stays as it is."""
        product = self.directory / name
        if not product.is_dir():
            if name not in self.config.phases:
                return
            self._train(name, loggers)
            if self.config.trainer.strategy == "fsdp":
                self._load_best(name)
            method = self.method
            if name == "router" and isinstance(method, First) and method.calibrate_rate and method.target_skip:
                threshold = calibrate_rate(self._prompts(self.data.val), method.target_skip)
                _say(f"threshold {threshold:.4f} for a skip rate of {method.target_skip:g}")
            if rank()[0] == 0:
                temporary = self.directory / f".{name}.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                self.model.save_pretrained(temporary)
                temporary.rename(product)
            barrier()
        self.model = load_model(self.config, product)

    def _load_best(self, name: str) -> None:
        """After sharded training: an unsharded model with the weights of the phase's best checkpoint."""
        router = self.directory / "router"
        start = router if name == "lora" and router.is_dir() else model_path(self.config.model.path)
        self.model = load_model(self.config, start)
        if name == "lora":
            self._add_lora()
        file = self.directory / "checkpoints" / name / "best.ckpt"
        if name == "router" and not file.is_file():
            return  # one phase trains them later
        best = read_checkpoint(file)["state_dict"]
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in best.items()}, strict=False)

    def _add_lora(self) -> None:
        torch.manual_seed(self.config.seed)
        self.model.add_lora(self.config.lora)

    def _train(self, name: str, loggers: list[Logger]) -> None:
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
        objective = replace(self._objective(name), distill=phase.distill)
        module: RouterModule | LoRACompensationModule
        started: dict[str, float] = {}
        one_phase = isinstance(method, First) and method.one_phase
        if name == "router":
            if isinstance(method, First) and method.start != "random":
                count = method.calibration_prompts
                _say(f"calibrating the routers' start ({method.start}) on {count} training prompts")
                started = start_phase_1(self.directory, method, self._prompts(data.train))
            if one_phase:
                data.max_length = config.data.max_length_lora
                self._record_phase(name, {"steps": 0, "multiplier": objective.multiplier, "seconds": 0.0, **started})
                return
            module = RouterModule(self.model, objective, optimizer, config.seed)
        elif one_phase:
            self._add_lora()
            optimizer = replace(optimizer, router_learning_rate=config.router_phase.learning_rate)
            module = OnePhaseModule(
                self.model, replace(self._objective("router"), distill=phase.distill), optimizer, config.seed
            )
        else:
            routes, val_routes = self._training_routes(), self._routes(data.val)
            self._add_lora()
            if routes is not None:
                objective = replace(objective, target_skip=None, objective="decode_consistent")
            module = LoRACompensationModule(self.model, objective, optimizer, config.seed, routes, val_routes)
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
        resume = config.ckpt == "last"
        resumed = resume and (checkpoints / "last.ckpt").is_file()
        start = time.perf_counter()
        named: list[Logger] = [PhaseLogger(each, name) for each in loggers]
        kept = fit_phase(module, data, settings, checkpoints, named, resume)
        seconds = time.perf_counter() - start
        record = {"steps": int(steps), "multiplier": module.multiplier, "seconds": seconds, **started, **kept}
        if resumed:
            record["resumed"] = True  # the seconds are those since then
        data.max_length = config.data.max_length_lora  # for what follows, whether or not phase 1 ran just now
        self._record_phase(name, record)

    def _record_phase(self, name: str, record: dict[str, Any]) -> None:
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
            hold_routes=method.route_weight if name == "lora" else 0.0,
        )

    def _phase_record(self, name: str) -> dict[str, Any] | None:
        file = self.directory / f"{name}.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _evaluate(self, name: str, routes: Routes | None) -> dict[str, Any]:
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
                static_routes(self.directory, self.method, self.model.num_layers),
            )
            if rank()[0] == 0:
                write_atomically(file, yaml.safe_dump(variant, sort_keys=False))
            barrier()
        return yaml.safe_load(file.read_text(encoding="utf-8"))


def _say(message: str) -> None:
    if rank()[0] == 0:
        print(message, flush=True)
