"""The story of one run, from its configuration to `result.json`; what an earlier try has done is not done again."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch

from firstlab.config import build
from firstlab.config.schema import TRAINED, ExperimentConfig
from firstlab.data.files import warn
from firstlab.evaluation.decoding import check_engine
from firstlab.evaluation.predictions import digest, fingerprint, source_of
from firstlab.evaluation.scoring import check_metrics
from firstlab.methods.base import Method
from firstlab.model.routes import Routes
from firstlab.run import directory
from firstlab.run.context import Run, say
from firstlab.run.loggers import LOG_MODEL, close_failed, close_logger, keep_model, log_evaluation, open_loggers
from firstlab.run.phases import compensate_with_lora, refit, train_routers, tune
from firstlab.store import machine, results
from firstlab.store.files import claimed, read_own, sealed, write_atomically, yaml_text
from firstlab.store.ranks import barrier, rank


class Experiment(Run):
    """One run of a checked configuration and its method; ValueError if its directory or a device is not to be had."""

    def __init__(self, config: ExperimentConfig, method: Method) -> None:
        self.config, self.method = config, method
        self.directory = config.directory(method.label)
        config.model.check_trainable()
        trains = bool({"tune", "lora"} & set(config.phases)) or ("router" in config.phases and method.trains_routers)
        if trains and config.data.val_size == 0:
            raise ValueError("data.val_size=0: training keeps the weights that validate best, so give it at least 1")
        if "router" in config.phases and (start := method.router_start()) is not None:
            start.check(config.router.threshold)
        tunes = "tune" in config.phases or (self.directory / "tune").is_dir()
        if config.lora_start == "continue" and "lora" in config.phases and method.name != "none" and not tunes:
            raise ValueError("lora_start=continue goes on from the tuned LoRA: add tune to phases, or leave it out")
        if (fit := method.route_fit()) is not None and "router" in config.phases:
            fit.check_rates(config.evaluation.skip_rates)
        build.check_device(config.trainer)
        if rank()[0] == 0:
            directory.check_directory(self.directory, config)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns the record that is in result.json."""
        number, world = rank()
        # Several processes of one run would time out waiting for each other, so those do not wait for another run.
        with claimed(self.directory, wait=world == 1) if number == 0 else nullcontext():
            try:
                return self._finished() or self._run()
            except Exception as error:
                for logger in getattr(self, "loggers", ()):
                    logger.finalize("failed")
                if number == 0 and results.SWEEP_JOB in os.environ:
                    results.write_failure(self.directory, error)
                raise

    def _run(self) -> dict[str, Any]:
        """Start, train routers, evaluate, compensate with LoRA, evaluate, record."""
        begun = time.perf_counter()
        machine.reset_peak_memory()
        with directory.taken_over(self.directory, self.config) as resumed:
            self._start()
        before, after = directory.variant_names(self.method)
        wanted = directory.wanted_variants(self.config, self.method)
        variants: dict[str, Any] = {}

        tune(self)  # where the run chooses on a model that knows its task
        train_routers(self)  # phase 1 (§4.1)
        if self.tuned:
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

        return self._write(
            variants,
            fixed_routes=None if routes is None or self.method.per_prompt else routes.to_json(),
            peak_memory_bytes=machine.peak_memory_bytes(self.model.device),
            resumed=resumed,  # then the time is that since it was resumed
            wall_s=time.perf_counter() - begun,
        )

    def _finished(self) -> dict[str, Any] | None:
        if rank()[0] == 0:
            directory.check_directory(self.directory, self.config)
            (self.directory / results.FAILURE).unlink(missing_ok=True)
        barrier()
        record = directory.finished_record(self.config, self.method)
        if record is not None:
            say(f"{self.directory} is finished already; overwrite=true runs it again")
        return record

    def _start(self) -> None:
        """Open what the run needs: what can be wrong with a command shows here, in little time."""
        if (initial := self.config.init_from) is not None and not Path(build.model_path(initial)).is_dir():
            raise ValueError(f"init_from={initial!r} does not exist; give the folder of a saved model")
        build.check_lora_targets(self.config)
        try:
            self.loggers = open_loggers(self.config, self.directory, self.method.name)
            self._read_data()
            self._load_model()
        except BaseException:
            if rank()[0] == 0:
                close_failed(self.config.logger)
            raise

    def _read_data(self) -> None:
        config = self.config
        L.seed_everything(config.seed, workers=True, verbose=False)
        self.data = build.build_data(config)
        self.data.setup("fit")
        sizes = f"{len(self.data.train)} training and {len(self.data.val)} validation examples"
        if "evaluate" in config.phases:
            # A wrong path or a malformed line stops here, not after the training.
            build.check_test_set(self.data)
            if config.evaluation.perplexity:
                self.data.setup("test")
            self.data.setup("predict")
            sizes += f", {len(self.data.test)} to test"
            check_metrics(self.data.task, config.evaluation)
        say(f"data {config.data.name}: {sizes}")

    def _load_model(self) -> None:
        """The model that the first step starts from, if what earlier steps have left is whole."""
        config = self.config
        for phase in TRAINED:
            directory.phase_record(self.directory, phase)
        trained = config.init_from is not None or (self.directory / "router").is_dir()
        if self.method.trains_routers and "router" not in config.phases and not trained:
            raise ValueError(f"phases={config.phases} needs trained routers: set init_from, or add router to phases")
        self.model = build.load_model(config, build.model_path(config.init_from or config.model.path))
        if config.trainer.tf32 and self.model.lm.dtype == torch.float32:
            say("float32 products use TF32; trainer.tf32=false computes them in full precision, much slower")
        self.method.rounding(self.model.num_layers)
        if "evaluate" in config.phases:
            check_engine(self.model, "evaluation.decoder", config.evaluation.decoder)
        build.check_vocabulary(config, self.data.tokenizer, self.model)

    def _evaluate(self, name: str, routes: Routes | None, source: str) -> dict[str, Any]:
        """Evaluate a variant, unless an earlier try has done so and left its part of the record on disk."""
        file, predictions = self.directory / "evaluation" / f"{name}.yaml", self._predictions(name)

        def key() -> str:
            """Of the weights and routes, the test prompts, and what was said to them."""
            said = predictions.read_text(encoding="utf-8")
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
        variant = self.evaluate(name, routes, source, predictions.parent)
        if rank()[0] == 0:
            write_atomically(file, sealed(yaml_text({"key": key(), "variant": variant})))
        barrier()
        return read_own(file, parse)

    def _predictions(self, name: str) -> Path:
        return self.directory / "predictions" / f"{name}.jsonl"

    def _write(self, variants: dict[str, Any], **more: Any) -> dict[str, Any]:
        """Write what was evaluated, result.json last; returns it as any later reader finds it."""
        record, joined = self.record(self.directory, variants=variants, **more), self.directory / "predictions.jsonl"
        if rank()[0] == 0:
            if variants:
                rows = [
                    {"variant": name, **json.loads(line)}
                    for name in variants
                    for line in self._predictions(name).read_text(encoding="utf-8").split("\n")[:-1]
                ]
                write_atomically(joined, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                for logger in self.loggers:
                    log_evaluation(logger, record, joined)
                results.write(self.directory, record)
                if (self.config.logger or {}).get(LOG_MODEL):
                    for logger in self.loggers:
                        keep_model(logger, self.directory)
            for logger in self.loggers:
                close_logger(logger)
        barrier()
        return results.read(self.directory) or record
