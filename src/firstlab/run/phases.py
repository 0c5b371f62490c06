"""Train the routers of a run, then LoRA; each phase leaves a record (NAME.yaml) and a saved model (NAME/)."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlab.config.build import load_model, model_path
from firstlab.config.command_line import during
from firstlab.config.schema import ExperimentConfig
from firstlab.data.batching import batch_count
from firstlab.data.files import warn
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import FixedRoutes, Routes
from firstlab.run.choosing import fit_again, fit_route_router, training_routes
from firstlab.run.context import Run, say
from firstlab.run.directory import variant_names
from firstlab.run.loggers import PhaseLogger
from firstlab.store.files import read_own, sealed, write_atomically, yaml_text
from firstlab.store.ranks import barrier, rank
from firstlab.training.modules import LoRACompensationModule, OnePhaseModule, Phase, RouterModule
from firstlab.training.router_start import calibrate_rate, start_phase_1
from firstlab.training.trainer import fit_phase

PHASES = ("tune", "router", "lora", "refit")
# Training prompts whose per-layer decisions a refit keeps.
_KEPT_DECISIONS = 512


def tune(run: Run) -> None:
    """Teach the model its task first, every layer run, so that what is chosen then is chosen on a model that knows it.

    The model goes on with this LoRA merged, in memory.
    """
    if _is_wanted(run, "tune"):
        steps, objective = _read_as(run, "tune"), replace(run.method.training_objective("lora"), target_skip=None)
        dense = FixedRoutes(torch.ones(run.model.num_layers, dtype=torch.bool))
        _add_lora(run)
        module = LoRACompensationModule(
            run.model,
            objective=replace(objective, objective="decode_consistent"),
            phase=run.settings("tune"),
            seed=run.config.seed,
            routes=dense,
            val_routes=dense,
        )
        _finish(run, "tune", _fit(run, "tune", module, steps))
    if is_tuned(run):
        run.model.merge_and_unload()


def train_routers(run: Run) -> None:
    """Phase 1 (§4.1): put the routers at the method's start and train them; everything else is frozen."""
    method = run.method
    if not method.trains_routers or not _is_wanted(run, "router"):
        return
    if method.route_fit() is not None:
        run.data.max_length = run.config.data.max_length_router
        begun = time.perf_counter()
        with run.reading("the fit of the router"):
            fitted = fit_route_router(run)
        _finish(run, "router", fitted | {"steps": 0, "multiplier": 0.0, "seconds": time.perf_counter() - begun})
        return
    steps = _read_as(run, "router")
    record: dict[str, Any] = {}  # how well the start fits
    if (start := method.router_start()) is not None:
        with run.reading("the routers' calibration"):
            record |= start_phase_1(run.directory, start, run.prompts(run.data.train))
    objective = method.training_objective("router")  # α is its multiplier
    if method.one_phase:
        record |= {"steps": 0, "multiplier": objective.multiplier, "seconds": 0.0}
    else:
        phase = run.settings("router")
        module = RouterModule(run.model, objective=objective, phase=phase, seed=run.config.seed)
        record = _fit(run, "router", module, steps) | record
    _finish(run, "router", record)


def compensate_with_lora(run: Run) -> None:
    """Phase 2 (§4.2): train LoRA under the routes that phase 1, or the method, has fixed."""
    method, config = run.method, run.config
    if not _is_wanted(run, "lora"):
        return
    steps = _read_as(run, "lora")
    phase = run.settings("lora")
    module: Phase
    if method.one_phase:
        _add_lora(run)
        module = OnePhaseModule(
            run.model,
            objective=method.training_objective("router"),
            phase=phase,
            seed=config.seed,
            router_learning_rate=config.router_phase.learning_rate,
        )
    else:
        before = phase_record(run.directory, "router")
        objective = method.training_objective("lora", None if before is None else before["multiplier"])
        routes, val_routes = _training_routes(run), run.routes(run.data.val)
        if routes is None and (method.route_fit() is not None or is_tuned(run)):
            routes, val_routes = training_routes(run)
        if is_tuned(run):
            _begin_lora(run)
        if routes is not None:
            objective = replace(objective, target_skip=None, objective="decode_consistent")
        if not run.model.has_lora:
            _add_lora(run)
        module = LoRACompensationModule(
            run.model,
            objective=objective,
            phase=phase,
            seed=config.seed,
            routes=routes,
            val_routes=val_routes,
            held_rho=_held_rho(run) if routes is None and objective.hold_routes > 0 else None,
        )
    _finish(run, "lora", _fit(run, "lora", module, steps))


def refit(run: Run) -> None:
    """Fit the routers again under the trained LoRA, whose states they read from now on."""
    if not run.method.trains_routers or not _is_wanted(run, "refit"):
        return
    begun = time.perf_counter()
    run.model = load_product(run.config, run.directory, "lora")
    run.model.merge_and_unload()
    with run.reading("the second fit of the router"):
        record = fit_again(run)
    _finish(run, "refit", record | {"steps": 0, "multiplier": 0.0, "seconds": time.perf_counter() - begun})


def is_tuned(run: Run) -> bool:
    """Whether the run chooses on a model that was tuned first."""
    return (run.directory / "tune").is_dir()


def _begin_lora(run: Run) -> None:
    """The model that phase 2 of a tuned run trains: the base with a fresh LoRA, or the tuned one's that goes on."""
    routers = run.model.routers
    folder = run.directory / "tune" if run.config.lora_start == "continue" else model_path(run.config.model.path)
    run.model = load_model(run.config, folder)
    run.model.take_routers(routers)


def phase_record(directory: Path, phase: str) -> dict[str, Any] | None:
    """What NAME.yaml says about a phase, None if this run has not trained it; ValueError if the file is damaged."""

    def parse(saved: Any) -> dict[str, Any]:
        if not all(isinstance(saved[key], int | float) for key in ("steps", "multiplier", "seconds")):
            raise ValueError("it holds no record of a phase")
        return dict(saved)

    file, product = directory / f"{phase}.yaml", directory / phase
    if not file.is_file() and not product.is_dir():
        return None
    remedy = f"delete it and {product}, and result.json if there is one, and give the training command again"
    return read_own(file, parse, f"{remedy} to train this phase")


def load_product(config: ExperimentConfig, directory: Path, phase: str) -> RouterAugmentedLM:
    """The model that a phase has saved; raises ValueError if something of it is missing."""
    folder = directory / phase
    model = load_model(config, folder)
    if phase in ("tune", "lora", "refit") and not model.has_lora:
        raise ValueError(
            f"{folder} has no LoRA weights (adapter_model.safetensors); put them back, or delete the folder, and "
            "result.json if there is one, and give the training command again"
        )
    return model


def _is_wanted(run: Run, phase: str) -> bool:
    """Whether to train a phase now. If it has been trained, load its model; without either leave the model as it is."""
    directory = run.directory
    if (directory / phase).is_dir():
        run.model = load_product(run.config, directory, phase)
        return False
    if phase not in run.config.phases:
        return False
    if phase == "router" and (directory / "lora").is_dir():
        raise ValueError(
            f"{directory} has lora/ but not router/, under whose routes it was trained: put router/ back, or delete "
            "lora/, and result.json if there is one, to train both again"
        )
    if rank()[0] == 0:  # what was made with an earlier model of the phase
        if phase in ("tune", "router"):
            (directory / "routes.json").unlink(missing_ok=True)
        if phase == "lora":
            shutil.rmtree(directory / "refit", ignore_errors=True)
        for variant in variant_names(run.method)[phase in ("lora", "refit") :]:
            for file in (directory / "evaluation" / f"{variant}.yaml", *directory.glob(f"predictions/{variant}.*")):
                file.unlink(missing_ok=True)
    barrier()
    return True


def _read_as(run: Run, phase: str) -> int:
    """Let the data be read as a phase wants it; returns the number of its optimizer steps."""
    data, settings, lengths = run.data, run.settings(phase), run.config.data
    data.batch_size = settings.batch_size
    data.loss_on = "all" if settings.loss_on == "all" else "response"
    data.max_length = lengths.max_length_router if phase == "router" else lengths.max_length_lora
    per_epoch = math.ceil(batch_count(len(data.train), settings.batch_size) / settings.accumulate)
    steps = int(min(settings.epochs * per_epoch, settings.max_steps or math.inf))
    data.total_batches = steps * settings.accumulate
    return steps


def _training_routes(run: Run) -> Routes | None:
    """The method's routes of the training prompts; only those that the phase comes to are decided."""
    if not run.method.per_prompt:
        return run.routes(run.data.train)
    used = run.data.trained_on()
    routes = torch.ones(len(run.data.train), run.model.num_layers, dtype=torch.bool)
    decided = run.routes([run.data.train[i] for i in used])
    assert isinstance(decided, FixedRoutes)
    routes[used] = decided.ran
    return FixedRoutes(routes)


def _held_rho(run: Run) -> Tensor | None:
    """rho of the prompts that the phase comes to, read in large batches rather than beside each step."""
    if run.config.trainer.read_batch_size is None:
        return None
    used = run.data.trained_on()
    rho = torch.zeros(len(run.data.train), run.model.num_layers)
    with run.reading("the reading of training prompts"):
        rho[used] = run.prompts([run.data.train[i] for i in used]).rho()
    return rho


def _add_lora(run: Run) -> None:
    torch.manual_seed(run.config.seed)
    run.model.add_lora(run.config.lora)


def _fit(run: Run, phase: str, module: Phase, steps: int) -> dict[str, Any]:
    """Train a phase from its last checkpoint, or its start; what is to be recorded about it."""
    settings = run.settings(phase)
    say(f"phase {phase}: {steps} steps of {settings.batch_size * settings.accumulate} prompts, {run.method.label}")
    checkpoints = run.directory / "checkpoints" / phase
    resume = run.config.ckpt == "last"
    resumed = resume and (checkpoints / "last.ckpt").is_file()
    small, large = run.config.evaluation.batch_size, run.config.read_batch_size
    run.data.eval_batch_size = small if module.reads_training_loss else large
    begun = time.perf_counter()
    with during(f"phase {phase} with {phase}_phase.batch_size={settings.batch_size}"):
        kept: dict[str, Any] = fit_phase(
            module,
            run.data,
            config=run.config.trainer,
            max_steps=steps,
            directory=checkpoints,
            loggers=[PhaseLogger(each, phase) for each in run.loggers],
            resume=resume,
        )
    if kept.get("warning") is not None:
        warn(f"phase {phase}: {kept['warning']}")
    record = {"steps": steps, "multiplier": module.multiplier, "seconds": time.perf_counter() - begun, **kept}
    record["resumed"] = resumed or None  # the seconds are those since then
    return {key: value for key, value in record.items() if value is not None}


def _finish(run: Run, phase: str, record: dict[str, Any]) -> None:
    """Record a phase, save its model, and go on with that as any later run does."""
    # What follows reads prompts and responses as long as in phase 2, whether or not phase 1 ran just now.
    run.data.max_length = run.config.data.max_length_lora
    if rank()[0] == 0:
        write_atomically(run.directory / f"{phase}.yaml", sealed(yaml_text(record)))
    skip_rate = run.method.threshold_skip
    if phase == "router" and skip_rate is not None:
        with run.reading("the threshold's calibration"):
            threshold = calibrate_rate(run.prompts(run.data.val), skip_rate)
        say(f"threshold {threshold:.4f} for a skip rate of {skip_rate:g}")
    if phase == "router" and is_tuned(run):
        _keep_decisions(run)
    if phase in _ON_EARLIER and (run.directory / _ON_EARLIER[phase]).is_dir():
        routers = run.model.routers
        run.model = load_product(run.config, run.directory, _ON_EARLIER[phase])
        run.model.take_routers(routers)
    if rank()[0] == 0:
        temporary = run.directory / f".{phase}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        run.model.save_pretrained(temporary)
        temporary.rename(run.directory / phase)
    barrier()
    run.model = load_product(run.config, run.directory, phase)


# Routers fitted on merged weights are saved beside the adapter that was merged.
_ON_EARLIER = {"router": "tune", "refit": "lora"}


def _keep_decisions(run: Run) -> None:
    """Note what per-layer routers decide on the tuned model, for a refit."""
    if run.method.route_fit() is None:
        decided = run.prompts(run.data.train).take(_KEPT_DECISIONS).routed()
        if rank()[0] == 0:
            write_atomically(run.directory / "decided.json", json.dumps(decided.tolist()) + "\n")
