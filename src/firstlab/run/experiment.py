"""The story of one run, from its configuration to `result.json`; what an earlier try has done is not done again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from firstlab.config import instantiate
from firstlab.config.build import (
    build_data,
    check_device,
    check_lora_targets,
    check_test_set,
    check_vocabulary,
    load_model,
    model_path,
)
from firstlab.config.schema import ExperimentConfig
from firstlab.data.files import warn
from firstlab.evaluation.decoding import check_engine
from firstlab.evaluation.predictions import digest, fingerprint, source_of
from firstlab.evaluation.scoring import check_metrics
from firstlab.evaluation.variant import evaluate_variant
from firstlab.methods.base import Method
from firstlab.model.routes import Routes
from firstlab.run.context import Run, say
from firstlab.run.decisions import static_routes
from firstlab.run.directory import check_directory, finished_record, taken_over, variant_names, wanted_variants
from firstlab.run.loggers import (
    JsonLinesLogger,
    close_failed,
    close_logger,
    log_evaluation,
    logger_options,
    open_logger,
)
from firstlab.run.phases import (
    PHASES,
    compensate_with_lora,
    is_tuned,
    phase_record,
    refit,
    train_routers,
    tune,
)
from firstlab.run.record import record_of
from firstlab.store import machine, results
from firstlab.store.files import claimed, read_own, sealed, write_atomically, yaml_text
from firstlab.store.ranks import barrier, rank


class Experiment(Run):
    """One run of a checked configuration and its method; ValueError if its directory or a device is not to be had."""

    def __init__(self, config: ExperimentConfig, method: Method) -> None:
        self.config, self.method = config, method
        self.directory = config.directory(method.label)
        config.model.check_trainable()
        if config.router.kind != method.router_kind:
            other = "routes" if config.router.kind == "routes" else "first"
            raise ValueError(
                f"router.kind={config.router.kind} and method={method.name} do not go together: choose method={other}, "
                f"or router.kind={method.router_kind}"
            )
        if config.evaluation.skip_rates and method.router_kind != "routes":
            raise ValueError(
                f"evaluation.skip_rates={config.evaluation.skip_rates}: {method.name} knows one rate; choose "
                "method=routes, or leave it out"
            )
        if "refit" in config.phases and not (method.trains_routers and "lora" in config.phases):
            raise ValueError(f"phases={config.phases}: refit needs a method that trains routers, and lora before it")
        trains = bool({"tune", "lora"} & set(config.phases)) or ("router" in config.phases and method.trains_routers)
        if trains and config.data.val_size == 0:
            raise ValueError("data.val_size=0: training keeps the weights that validate best, so give it at least 1")
        start = method.router_start()
        if "router" in config.phases and start is not None:
            start.check(config.router.threshold)
        check_device(config.trainer)
        if rank()[0] == 0:
            check_directory(self.directory, config)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns the record that is in result.json."""
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
        """Start, train routers, evaluate, compensate with LoRA, evaluate, record."""
        finished = self._finished()
        if finished is not None:
            return finished
        begun = time.perf_counter()
        machine.reset_peak_memory()
        with taken_over(self.directory, self.config) as resumed:
            self._start()
        before, after = variant_names(self.method)
        wanted = wanted_variants(self.config, self.method)
        variants: dict[str, Any] = {}

        tune(self)  # where the run chooses on a model that knows its task
        train_routers(self)  # phase 1 (§4.1)
        if is_tuned(self):
            self.model.merge_and_unload()
        # One set of routes for all prompts, one for each test prompt, or None: the routers read each prompt (§4.3).
        routes = self.routes(self.data.test) if wanted else None
        if before in wanted:
            variants[before] = self._evaluate(before, routes, source_of(self.model, routes))
        compensate_with_lora(self)  # phase 2 (§4.2)
        refit(self)
        if after in wanted:
            source = source_of(self.model, routes)
            self.model.merge_and_unload()
            variants[after] = self._evaluate(after, routes, source)

        record = record_of(
            self.directory,
            self.directory,
            self.config,
            self.method,
            self.model,
            variants=variants,
            fixed_routes=None if routes is None or self.method.per_prompt else routes.to_json(),
            peak_memory_bytes=machine.peak_memory_bytes(self.model.device),
            resumed=resumed,  # then the time is that since it was resumed
            wall_s=time.perf_counter() - begun,
        )
        if rank()[0] == 0:
            if variants:
                self._join_predictions(variants)
                for logger in self.loggers:
                    log_evaluation(logger, record, self.directory / "predictions.jsonl")
                results.write(self.directory, record)
            for logger in self.loggers:
                close_logger(logger)
        barrier()
        return results.read(self.directory) or record  # as any later reader finds it

    def _finished(self) -> dict[str, Any] | None:
        if rank()[0] == 0:
            check_directory(self.directory, self.config)
            (self.directory / results.FAILURE).unlink(missing_ok=True)
        barrier()
        record = finished_record(self.config, self.method)
        if record is not None:
            say(f"{self.directory} is finished already; overwrite=true runs it again")
        return record

    def _start(self) -> None:
        """Open what the run needs: what can be wrong with a command shows here, in little time."""
        initial = self.config.init_from
        if initial is not None and not Path(model_path(initial)).is_dir():
            raise ValueError(f"init_from={initial!r} does not exist; give the folder of a saved model")
        check_lora_targets(self.config)
        try:
            self._open_loggers()
            self._read_data()
            self._load_model()
        except BaseException:
            if rank()[0] == 0:
                close_failed(self.config.logger)
            raise

    def _open_loggers(self) -> None:
        self.loggers: list[Logger] = [JsonLinesLogger(self.directory / "metrics.jsonl")]
        if self.config.logger:
            node = dict(self.config.logger)
            logger = instantiate.build(node, "logger", Logger, **logger_options(node, self.directory, self.method.name))
            if rank()[0] == 0:
                open_logger(logger)
                logger.log_hyperparams(self.config.identity())
            self.loggers.append(logger)

    def _read_data(self) -> None:
        config = self.config
        L.seed_everything(config.seed, workers=True, verbose=False)
        self.data = build_data(config)
        self.data.setup("fit")
        sizes = f"{len(self.data.train)} training and {len(self.data.val)} validation examples"
        if "evaluate" in config.phases:
            # A wrong path or a malformed line stops here, not after the training.
            check_test_set(self.data)
            if config.evaluation.perplexity:
                self.data.setup("test")
            self.data.setup("predict")
            sizes += f", {len(self.data.test)} to test"
            check_metrics(self.data.task, config.evaluation)
        say(f"data {config.data.name}: {sizes}")

    def _load_model(self) -> None:
        """The model that the first step starts from, if what earlier steps have left is whole."""
        config = self.config
        for phase in PHASES:
            phase_record(self.directory, phase)
        path = config.model.path if config.init_from is None else config.init_from
        trained = config.init_from is not None or (self.directory / "router").is_dir()
        if self.method.trains_routers and "router" not in config.phases and not trained:
            raise ValueError(
                f"phases={config.phases} needs trained routers, and {self.directory} has none; "
                "set init_from to a saved model, or add router to phases"
            )
        self.model = load_model(config, model_path(path))
        if config.trainer.tf32 and self.model.lm.dtype == torch.float32:
            say("float32 products use TF32; trainer.tf32=false computes them in full precision, much slower")
        self.method.rounding(self.model.num_layers)
        if "evaluate" in config.phases:
            check_engine(self.model, "evaluation.decoder", config.evaluation.decoder)
        check_vocabulary(config, self.data.tokenizer, self.model)

    def _evaluate(self, name: str, routes: Routes | None, source: str) -> dict[str, Any]:
        """Evaluate a variant, unless an earlier try has done so and left its part of the record on disk."""
        file, directory = self.directory / "evaluation" / f"{name}.yaml", self.directory / "predictions"

        def key() -> str:
            """Of the weights and routes, the test prompts, and what was said to them."""
            said = (directory / f"{name}.jsonl").read_text(encoding="utf-8")
            return digest([source, fingerprint(self.data.test), said])

        def parse(saved: Any) -> dict[str, Any]:
            if saved["key"] != key():
                raise ValueError("it is about other test prompts, weights or routes, or predictions are missing")
            return dict(saved["variant"])

        if file.is_file():
            try:
                return read_own(file, parse, "it is made again")
            except ValueError as error:
                warn(str(error))
            barrier()  # nobody writes while another one reads
        with self.reading(f"the evaluation of {name}"):
            variant = evaluate_variant(
                self.model,
                self.data,
                self.config.evaluated(),
                directory,
                name,
                routes,
                source,
                self.config.seed,
                self.config.trainer.progress_bar,
                static_routes(self.directory, self.method, self.model.num_layers),
            )
        if rank()[0] == 0:
            write_atomically(file, sealed(yaml_text({"key": key(), "variant": variant})))
        barrier()
        return read_own(file, parse)

    def _join_predictions(self, names: Iterable[str]) -> None:
        files = {name: self.directory / "predictions" / f"{name}.jsonl" for name in names}
        rows = [
            {"variant": name, **json.loads(line)}
            for name, file in files.items()
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(self.directory / "predictions.jsonl", text)
