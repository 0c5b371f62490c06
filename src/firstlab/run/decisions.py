"""What a run's method decides: made once, kept in the run directory, read by training, evaluation and generation.

`routes.json` holds a decision for all prompts, null where trained routers decide; `routes.jsonl` one for each prompt.
"""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import suppress
from itertools import starmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from firstlab.data.task import Example
from firstlab.methods.base import Method, routes_without
from firstlab.model.routes import FixedRoutes, Routes, as_routes, routes_from_json
from firstlab.store.files import read_own, write_atomically
from firstlab.store.ranks import barrier, rank
from firstlab.training.prompt_set import PromptSet
from firstlab.training.router_start import STATIC_ORDER, read_order


def shared_routes(directory: Path, method: Method, training: PromptSet) -> Routes | None:
    """The decision that holds for all prompts, or None where trained routers decide; made only once."""
    file = directory / "routes.json"
    if not file.is_file() and rank()[0] == 0:
        routes = method.routes(training)
        if isinstance(routes, Tensor):
            _check_tensor(method, routes, [training.num_layers])
        write_atomically(file, json.dumps(None if routes is None else as_routes(routes).to_json()) + "\n")
    barrier()
    return _read_shared(file, training.num_layers)


def prompt_routes(directory: Path, method: Method, prompts: PromptSet) -> FixedRoutes:
    """[N, L], what a `per_prompt` method decides for each of these prompts; what is on disk is not decided again."""
    file = directory / "routes.jsonl"
    keys = [_key(text, example) for text, example in zip(prompts.texts, prompts.examples, strict=True)]
    if rank()[0] == 0:
        known = _read_lines(file, prompts.num_layers)
        write_atomically(file, "".join(starmap(_line, known.items())))  # without what a kill or a hand has damaged
        left = list({key: x for key, x in zip(keys, prompts.examples, strict=True) if key not in known}.items())
        size, hidden = prompts.batch_size, not prompts.progress_bar
        for start in tqdm(range(0, len(left), size), desc="decide routes", unit="batch", disable=hidden):
            names, examples = zip(*left[start : start + size], strict=True)
            routes = method.routes(PromptSet(prompts.model, prompts.data, examples, size, prompts.cache_bytes))
            decided = _check_tensor(method, routes, [len(names), prompts.num_layers])
            with file.open("a", encoding="utf-8") as out:
                for key, route in zip(names, decided, strict=True):
                    out.write(_line(key, (~route).nonzero()[:, 0].tolist()))
    barrier()
    known = _read_lines(file, prompts.num_layers)
    return FixedRoutes(torch.stack([routes_without(prompts.num_layers, known[key]) for key in keys]))


def decided_routes(directory: Path, method: Method, variant: str, prompts: PromptSet) -> Routes | None:
    """What a trained run decodes these prompts with: every layer for the base, else what its method has decided."""
    if variant == "base":
        return FixedRoutes(routes_without(prompts.num_layers, []))
    if method.per_prompt:
        return prompt_routes(directory, method, prompts)
    file = directory / "routes.json"
    if not file.is_file():
        raise ValueError(f"{directory} has no routes.json: {method.name} has not decided yet; run its training first")
    return _read_shared(file, prompts.num_layers)


def static_routes(directory: Path, method: Method, num_layers: int) -> Tensor | None:
    """[L], the static set of k layers at the method's skip rate, where the run has found its order."""
    if not (directory / STATIC_ORDER).is_file() or method.target_skip is None:
        return None
    count = method.target_skip * num_layers
    return routes_without(num_layers, read_order(directory, num_layers, math.ceil(count))[: round(count)])


def _check_tensor(method: Method, routes: Tensor | Routes | None, shape: list[int]) -> Tensor:
    if not isinstance(routes, Tensor) or list(routes.shape) != shape or routes.dtype != torch.bool:
        got = f"{routes.dtype} of shape {list(routes.shape)}" if isinstance(routes, Tensor) else repr(routes)
        raise ValueError(f"method {method.name}: routes() gave {got}, and must give torch.bool of shape {shape}")
    return routes


def _read_shared(file: Path, num_layers: int) -> Routes | None:
    def parse(saved: Any) -> Routes | None:
        if saved is None:
            return None
        routes = routes_from_json(saved)
        routes.check(num_layers)
        if isinstance(routes, FixedRoutes) and routes.ran.ndim != 1:
            raise ValueError("it holds routes of single prompts")
        return routes

    return read_own(file, parse)


def _line(key: str, skipped: list[int]) -> str:
    return json.dumps({"prompt": key, "skipped": skipped}) + "\n"


def _read_lines(file: Path, num_layers: int) -> dict[str, list[int]]:
    """The decisions on disk; a line cut off by a kill, or damaged, is left out, for its prompt is decided again."""
    known: dict[str, list[int]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else ():
        with suppress(ValueError, LookupError, TypeError):
            decision = json.loads(line)
            if set(decision["skipped"]) <= set(range(num_layers)):
                known[str(decision["prompt"])] = list(decision["skipped"])
    return known


def _key(text: str, example: Example) -> str:
    # A decision may depend on the prompt and its references alone.
    return hashlib.sha256(json.dumps([text, *example.references]).encode()).hexdigest()[:24]
