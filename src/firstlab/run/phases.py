"""Train the routers of a run, then LoRA; each phase leaves a record (NAME.yaml) and a saved model (NAME/)."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
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
from firstlab.model.routes import FixedRoutes
from firstlab.run.choosing import fit_again, fit_route_router, training_routes
from firstlab.run.context import Run, say
from firstlab.run.directory import phase_record, variant_names
from firstlab.run.loggers import PhaseLogger
from firstlab.store.files import sealed, write_atomically, yaml_text
from firstlab.store.ranks import barrier, rank
from firstlab.training.modules import LoRACompensationModule, OnePhaseModule, Phase, RouterModule
from firstlab.training.router_start import calibrate_rate, start_phase_1
from firstlab.training.trainer import fit_phase

# Training prompts whose per-layer decisions a refit keeps.
_KEPT_DECISIONS = 512


def tune(run: Run) -> None:
    """Teach the model its task with every layer run, so that routes are chosen on a model that knows it."""
    if _begin(run, "tune"):
        dense = FixedRoutes(torch.ones(run.model.num_layers, dtype=torch.bool))
        objective = replace(run.method.training_objective("lora"), target_skip=None, objective="decode_consistent")
        phase, seed = run.settings("tune"), run.config.seed
        _add_lora(run)
        module = LoRACompensationModule(
            run.model, objective=objective, phase=phase, seed=seed, routes=dense, val_routes=dense
        )
        _finish(run, "tune", _fit(run, "tune", module))
    if run.tuned:
        run.model.merge_and_unload()  # in memory


def train_routers(run: Run) -> None:
    """Phase 1 (§4.1): put the routers at the method's start and train them; everything else is frozen."""
    method = run.method
    if not method.trains_routers or not _begin(run, "router"):
        return
    if method.route_fit() is not None:
        with run.reading("the fit of the router"):
            fitted = _timed(lambda: fit_route_router(run))
        _finish(run, "router", fitted)
        return
    record: dict[str, Any] = {}  # how well the start fits
    if (start := method.router_start()) is not None:
        with run.reading("the routers' calibration"):
            record = start_phase_1(run.directory, start, run.prompts(run.data.train))
    objective = method.training_objective("router")  # α is its multiplier
    if method.one_phase:
        record |= {"steps": 0, "multiplier": objective.multiplier, "seconds": 0.0}
    else:
        phase = run.settings("router")
        module = RouterModule(run.model, objective=objective, phase=phase, seed=run.config.seed)
        record = _fit(run, "router", module) | record
    _finish(run, "router", record)


def compensate_with_lora(run: Run) -> None:
    """Phase 2 (§4.2): train LoRA under the routes that phase 1, or the method, has fixed."""
    method, config = run.method, run.config
    if not _begin(run, "lora"):
        return
    phase = run.settings("lora")
    module: Phase
    if method.one_phase:
        _add_lora(run)
        objective, rate = method.training_objective("router"), config.router_phase.learning_rate
        module = OnePhaseModule(
            run.model, objective=objective, phase=phase, seed=config.seed, router_learning_rate=rate
        )
    else:
        before = phase_record(run.directory, "router")
        objective = method.training_objective("lora", None if before is None else before["multiplier"])
        routes, val_routes = training_routes(run)
        if routes is not None:
            objective = replace(objective, target_skip=None, objective="decode_consistent")
        if run.tuned:  # go on from the base, or from the tuned LoRA, which is merged into the model that chose
            start = run.directory / "tune" if config.lora_start == "continue" else model_path(config.model.path)
            _replace_below_routers(run, load_model(config, start))
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
    _finish(run, "lora", _fit(run, "lora", module))


def refit(run: Run) -> None:
    """Fit the routers again under the trained LoRA, whose states they read from now on."""
    if not run.method.trains_routers or not _begin(run, "refit"):
        return
    run.model = load_product(run.config, run.directory, "lora")
    run.model.merge_and_unload()
    with run.reading("the second fit of the router"):
        record = _timed(lambda: fit_again(run))
    _finish(run, "refit", record)


def load_product(config: ExperimentConfig, directory: Path, phase: str) -> RouterAugmentedLM:
    """The model that a phase has saved; raises ValueError if something of it is missing."""
    folder = directory / phase
    model = load_model(config, folder)
    if phase != "router" and not model.has_lora:
        remedy = "put it back, or delete the folder and result.json, and give the training command again"
        raise ValueError(f"{folder} has no adapter_model.safetensors, its LoRA: {remedy}")
    return model


def _begin(run: Run, phase: str) -> bool:
    """Whether to train a phase now, the data being read as it wants; where it has been trained, load its model."""
    directory, data, settings, lengths = run.directory, run.data, run.settings(phase), run.config.data
    if (directory / phase).is_dir():
        run.model = load_product(run.config, directory, phase)
        return False
    if phase not in run.config.phases:
        return False
    if phase == "router" and (directory / "lora").is_dir():
        remedy = "put it back, or delete lora/, and result.json if there is one, to train both again"
        raise ValueError(f"{directory} has lora/ but not router/, under whose routes it was trained: {remedy}")
    if rank()[0] == 0:  # what was made with an earlier model of the phase
        if phase in ("tune", "router"):
            (directory / "routes.json").unlink(missing_ok=True)
        if phase == "lora":
            shutil.rmtree(directory / "refit", ignore_errors=True)
        for variant in variant_names(run.method)[phase in ("lora", "refit") :]:
            for file in (directory / "evaluation" / f"{variant}.yaml", *directory.glob(f"predictions/{variant}.*")):
                file.unlink(missing_ok=True)
    barrier()
    data.batch_size = settings.batch_size
    data.loss_on = "all" if settings.loss_on == "all" else "response"
    data.max_length = lengths.max_length_router if phase == "router" else lengths.max_length_lora
    per_epoch = math.ceil(batch_count(len(data.train), settings.batch_size) / settings.accumulate)
    steps = int(min(settings.epochs * per_epoch, settings.max_steps or math.inf))
    data.total_batches = steps * settings.accumulate
    return True


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


def _replace_below_routers(run: Run, model: RouterAugmentedLM) -> None:
    routers = run.model.routers
    run.model = model
    run.model.take_routers(routers)


def _timed(fit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a fit that takes no optimizer steps."""
    begun = time.perf_counter()
    return fit() | {"steps": 0, "multiplier": 0.0, "seconds": time.perf_counter() - begun}


def _fit(run: Run, phase: str, module: Phase) -> dict[str, Any]:
    """Train a phase from its last checkpoint, or its start; what is to be recorded about it."""
    settings, trainer = run.settings(phase), run.config.trainer
    steps = run.data.total_batches // settings.accumulate
    say(f"phase {phase}: {steps} steps of {settings.batch_size * settings.accumulate} prompts, {run.method.label}")
    checkpoints = run.directory / "checkpoints" / phase
    resume, begun = run.config.ckpt == "last", time.perf_counter()
    resumed = resume and (checkpoints / "last.ckpt").is_file()
    loggers: list[Any] = [PhaseLogger(each, phase) for each in run.loggers]
    small, large = run.config.evaluation.batch_size, run.config.read_batch_size
    run.data.eval_batch_size = small if module.reads_training_loss else large
    with during(f"phase {phase} with {phase}_phase.batch_size={settings.batch_size}"):
        kept: dict[str, Any] = fit_phase(
            module, run.data, config=trainer, max_steps=steps, directory=checkpoints, loggers=loggers, resume=resume
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
    if phase == "router" and run.tuned and run.method.route_fit() is None:  # what per-layer routers decide, for a refit
        decided = run.prompts(run.data.train).take(_KEPT_DECISIONS).routed()
        if rank()[0] == 0:
            write_atomically(run.directory / "decided.json", json.dumps(decided.tolist()) + "\n")
    run.model.to("cpu")  # makes room for the next
    earlier = {"router": "tune", "refit": "lora"}.get(phase)
    if earlier is not None and (run.directory / earlier).is_dir():
        # Routers fitted on merged weights are saved beside the adapter that was merged.
        _replace_below_routers(run, load_product(run.config, run.directory, earlier))
    if rank()[0] == 0:
        temporary = run.directory / f".{phase}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        run.model.save_pretrained(temporary)
        temporary.rename(run.directory / phase)
    barrier()
    run.model = load_product(run.config, run.directory, phase)
