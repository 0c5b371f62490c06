"""Open what a user points at: a run directory, a folder or hub id of firstlab, or any plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from firstlab.config.build import build_data, model_path
from firstlab.data.task import Task
from firstlab.hub.card import PublishedRun
from firstlab.hub.modeling import FirstlabForCausalLM
from firstlab.methods.base import routes_without
from firstlab.model.lm import RouterAugmentedLM
from firstlab.model.routes import FixedRoutes, Routes
from firstlab.model.storage import load_tokenizer, local_folder
from firstlab.run.decisions import decided_routes
from firstlab.run.load import load_run
from firstlab.store import results
from firstlab.training.prompt_set import PromptSet


class Source(NamedTuple):
    """A model and what it decodes with.

    Attributes:
        routes: What its method has fixed; None where routers decide.
        run: The run that it is from.
        task: What a run was trained on.
    """

    model: FirstlabForCausalLM
    tokenizer: Any
    routes: Routes | None
    run: PublishedRun | None
    task: Task | None = None


def is_run(path: str | Path) -> bool:
    return (Path(path).expanduser() / "config.yaml").is_file()


def open_run(path: str | Path, variant: str | None = None, overrides: dict[str, str] | None = None) -> Source:
    """The most trained variant of a run directory, or the one named.

    Raises:
        ValueError: It was not trained, or its method decides for each test prompt by itself.
    """
    directory = Path(path).expanduser()
    config, method, model, variant = load_run(directory, variant, overrides)
    if method.per_prompt and variant not in ("base", "base_lora"):
        raise ValueError(f"{path}: method={method.name} decides for its own test prompts alone, and for no others")
    data = build_data(config)
    routes = decided_routes(directory, method, variant, PromptSet(model, data, [], 1))
    run = PublishedRun(directory, results.read(directory), variant, routes is not None)
    return Source(FirstlabForCausalLM(model), data.tokenizer, routes, run, data.task)


def open_model(path: str, variant: str | None = None, **options: Any) -> Source:
    """A folder or hub id of firstlab, or any causal LM, which then runs every layer.

    Raises:
        ValueError: It cannot be loaded, or has no such variant.
    """
    if variant not in (None, "base"):
        raise ValueError(f"variant={variant!r} is for run directories, and {path} is none; leave it out, or say base")
    place = model_path(path)
    folder = local_folder(place, **({"revision": options["revision"]} if options.get("revision") else {}))
    if folder is not None:
        options.pop("revision", None)
        model = FirstlabForCausalLM.from_pretrained(folder, **options)
    else:
        model = FirstlabForCausalLM(RouterAugmentedLM.from_pretrained(place, **options))
    dense = FixedRoutes(routes_without(model.routed.num_layers, []))
    return Source(model.eval(), load_tokenizer(folder or place), dense if variant or folder is None else None, None)
