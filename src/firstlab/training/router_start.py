"""Calibrate routers on prompts before phase 1, and their threshold after it.

What a search has found is kept in the run directory, so that an interrupted run does not search again.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firstlab.methods.base import check_count
from firstlab.methods.objective import RouterStart
from firstlab.methods.sleb import elimination, one_by_one
from firstlab.store.files import read_own, write_atomically
from firstlab.store.ranks import rank
from firstlab.training import codebook
from firstlab.training.calibration import start_routers
from firstlab.training.prompt_set import PromptSet, check_finite
from firstlab.training.route_search import CODEBOOK, searched_once

# The SLEB order that routers with a calibrated start begin from: layers, best skipped first.
STATIC_ORDER = "start.json"


def start_phase_1(directory: Path, start: RouterStart, training: PromptSet) -> dict[str, float]:
    """Put the routers of the prompts' model where phase 1 begins; returns what is to be recorded about it."""
    if start.codebook_size > 1:
        return _from_codebook(directory, start, training)
    prompts = training.take(start.calibration_prompts)
    _say(f"calibrating the routers' start on {len(prompts)} training prompts")
    order = _static_order(directory, prompts, start) if start.skip_rate > 0 else []
    start_routers(prompts, order, skip_rate=start.skip_rate, margin=start.margin)
    return {}


def _static_order(directory: Path, prompts: PromptSet, start: RouterStart) -> list[int]:
    """Layers to skip, the last of them for a share of the prompts if the count is not whole."""
    layers, count = prompts.num_layers, start.skip_rate * prompts.num_layers

    def search() -> list[int]:
        check_count(math.ceil(count), layers, 1, 1)
        # The whole layers first, by themselves: with the last one in the search their set need not be the best.
        losses_of = one_by_one(prompts.loss, prompts.progress_bar)
        order = elimination(layers, math.floor(count), losses_of, width=start.search_width)
        return elimination(layers, math.ceil(count), losses_of, first=order)

    return searched_once(directory / STATIC_ORDER, search, partial(_order, layers, math.ceil(count)))


def read_order(directory: Path, num_layers: int, count: int) -> list[int]:
    """At least `count` layers in the order in which they are best skipped, as the run directory has them."""
    return read_own(directory / STATIC_ORDER, partial(_order, num_layers, count))


def _order(num_layers: int, count: int, saved: Any) -> list[int]:
    order = [int(layer) for layer in saved]
    if order != saved or len(set(order)) != len(order) or len(order) < count or not {*order} <= {*range(num_layers)}:
        raise ValueError(f"it is no order of {count} layers")
    return order


def _from_codebook(directory: Path, start: RouterStart, training: PromptSet) -> dict[str, float]:
    first = start.calibration_prompts
    prompts, others = training.slice(0, first), training.slice(first, first + start.fit_prompts)
    if len(others) < 4:
        raise ValueError(
            f"method.start=codebook needs at least 4 training prompts behind the first {first}, and there are "
            f"{len(others)}: lower method.calibration_prompts, or raise data.train_size"
        )
    _say(f"calibrating the routers' start (codebook) on {len(prompts)} training prompts and {len(others)} further ones")
    states = codebook.pooled_states(prompts)
    centres = codebook.cluster(states, start.codebook_size)
    measured = codebook.nearest(codebook.pooled_states(others), centres)

    def search() -> dict[str, Any]:
        found = codebook.find_codebook(prompts, codebook.nearest(states, centres), others, measured, start.skip_rate)
        return {"routes": found.tolist()}

    def parse(saved: Any) -> Tensor:
        found = torch.tensor(saved["routes"])
        if found.dtype != torch.bool or found.ndim != 2 or len(found) <= int(measured.max()):
            raise ValueError("it holds no routes of these prompts")
        return found

    routes = searched_once(directory / CODEBOOK, search, parse)
    wanted = routes[measured]
    trained = math.ceil(len(others) * 3 / 4)
    accuracy = codebook.fit_to_routes(others, wanted, margin=start.margin, trained=trained)
    started = {
        "start_accuracy": float(accuracy.mean()),
        "start_constant_accuracy": float(codebook.constant_accuracy(wanted, trained).mean()),
    }
    _say(
        f"codebook of {len(routes)}, skipping {', '.join(str(int(x)) for x in (~routes).sum(1))} layers: "
        f"{100 * started['start_accuracy']:.1f} % of decisions right on held-out prompts, "
        f"{100 * started['start_constant_accuracy']:.1f} % by constant ones"
    )
    if rank()[0] == 0:
        record = {"routes": routes.tolist(), "held_out_accuracy": accuracy.tolist()}
        write_atomically(directory / CODEBOOK, json.dumps(record) + "\n")
    return started


def calibrate_rate(validation: PromptSet, skip_rate: float) -> float:
    """Move the routers' threshold so that these prompts skip `skip_rate` on average; returns the new threshold."""
    model = validation.model
    rho = torch.cat([model.prompt_rho(batch["input_ids"], batch["prompt_mask"]) for batch in validation.batches])
    check_finite(rho, "rho of validation prompts")
    threshold = codebook.threshold_at(rho.cpu(), skip_rate)
    model.routers.settings = replace(model.routers.settings, threshold=threshold)
    return threshold


def _say(message: str) -> None:
    if rank()[0] == 0:
        print(message, flush=True)
