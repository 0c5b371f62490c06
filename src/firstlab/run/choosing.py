"""Choose routes with a fit instead of gradients, on a model that knows its task, and again under what was trained."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from firstlab.data.batching import shard_batches
from firstlab.data.datamodule import PromptDataModule
from firstlab.data.files import warn
from firstlab.evaluation.decoding import Decoder
from firstlab.evaluation.scoring import primary_metric, score_texts
from firstlab.methods.objective import RouteFit
from firstlab.model.generation_options import pinned_generation
from firstlab.model.route_router import RouteRouter
from firstlab.model.routers import Routers
from firstlab.model.routes import FixedRoutes, RoutersDecide, Routes
from firstlab.run.context import Run, say
from firstlab.store.files import read_own
from firstlab.training.calibration import fit_to_decisions
from firstlab.training.drawn_routes import DrawnRoutes
from firstlab.training.prompt_set import PromptSet
from firstlab.training.route_fit import (
    ENOUGH_HELD_OUT,
    RATES_OF_INTEREST,
    Measured,
    extend,
    fit_router,
    measure,
    read_means,
    use_static,
)
from firstlab.training.route_search import grown, saved_codebook, searched_once


def fit_route_router(run: Run, name: str = "router") -> dict[str, Any]:
    """Find a codebook, measure prompts under it and fit the run's `RouteRouter`; what is to be recorded about it."""
    fit, router = run.method.route_fit(), run.model.routers
    assert fit is not None and isinstance(router, RouteRouter)
    training = run.prompts(run.data.train)
    prompts = training.take(fit.fit_prompts)
    folder = run.directory / "fit"
    codebook = saved_codebook(folder, training.take(fit.calibration_prompts), fit)
    measured = measure(prompts, codebook, folder / name)  # a second fit measures the same codebook again
    wanted = run.config.router.price
    for turn in range(fit.grow_rounds):
        fit_router(router, measured, fit, "tokens" if wanted == "tokens" else "length")
        more = _grown(run, turn, measured, router, prompts, fit)
        if len(more):
            measured = extend(measured, measure(prompts, more, folder / f"{name}-grown{turn}"))
    price, scores = _best_price(run, router, measured, fit) if wanted == "auto" else (wanted, {})
    record = fit_router(router, measured, fit, price) | ({"validation_scores": scores} if scores else {})
    if not record["worth"]:
        use_static(router, measured, fit)
    _report(record)
    if (highest := router.highest_rate) < fit.target_skip - 1e-6:
        most = router.settings.max_harm
        bound = f"method.highest_skip={fit.highest_skip}" if most is None else f"router.max_harm={most}"
        warn(f"method.target_skip={fit.target_skip}: the routes skip {highest:.3g} at most, over tokens; raise {bound}")
    return record


def _grown(run: Run, turn: int, measured: Measured, router: RouteRouter, prompts: PromptSet, fit: RouteFit) -> Tensor:
    def parse(saved: Any) -> Tensor:
        found = torch.tensor(saved, dtype=torch.bool).reshape(-1, prompts.num_layers)
        known = {tuple(route) for route in measured.routes.tolist()}
        return found[[tuple(each) not in known for each in found.tolist()]]

    file = run.directory / "fit" / f"grown{turn}.json"
    return searched_once(file, lambda: grown(measured, router, prompts, fit).tolist(), parse)


def _best_price(run: Run, router: RouteRouter, measured: Measured, fit: RouteFit) -> tuple[str, dict[str, float]]:
    """The price whose routes score best when validation prompts are decoded, mean over a few rates."""
    scores = {}
    for price in ("length", "tokens"):
        fit_router(router, measured, fit, price)
        rates = (min(share * fit.target_skip, router.highest_rate) for share in RATES_OF_INTEREST)
        scores[price] = fmean(validation_score(run, RoutersDecide(rate)) for rate in rates)
    return max(scores, key=scores.__getitem__), scores


def validation_score(run: Run, routes: Routes) -> float:
    """The headline score of validation prompts, decoded under the routes."""
    data: PromptDataModule = copy(run.data)
    data.__dict__["test"] = run.data.val[:128]  # tells prices apart
    config = replace(run.config.evaluation, resamples=100, do_sample=False)
    decoder = Decoder(run.model, data, config, run.config.seed, routes)
    texts = [""] * len(data.test)
    run.model.eval()
    with pinned_generation(run.model.lm), torch.no_grad():
        batches = shard_batches(len(data.test), config.batch_size, 0, 1)
        for place, tokens, _ in decoder.responses(batches):
            texts[place] = decoder.text(tokens)
    return score_texts(data.task, data.test, texts, config)[primary_metric(data.task)].value


def _report(record: dict[str, Any]) -> None:
    low, high = record["gain_interval"]
    harm, length, rate = (100 * max(record[key], 0) for key in ("harm_r2", "length_r2", "skip_rate_by_token"))
    say(
        f"route router: {record['routes']} routes, measured on {record['prompts']} prompts. On held-out ones the "
        f"prompt tells {harm:.0f} % of what a route costs (R²) and {length:.0f} % of the response's length. With "
        f"{rate:.1f} % skipped over tokens the loss is {record['routed_loss']:.4f}, that of the best static sets "
        f"{record['static_loss']:.4f}, dense {record['dense_loss']:.4f} (difference {record['gain']:+.4f} "
        f"[{low:+.4f}, {high:+.4f}], price by {record['price']})"
    )
    if not record["worth"]:
        few = record["held_out"] < ENOUGH_HELD_OUT
        why = "too few held-out prompts to tell" if few else "reading the prompt is worth nothing here"
        say(f"{why}: every prompt gets the best set of the wanted size")


def training_routes(run: Run) -> tuple[Routes | None, Routes | None]:
    """Routes that LoRA is trained and validated under, as they are decided now; None: as the routers decide then."""
    data, fit = run.data, run.method.route_fit()
    if run.method.per_prompt:
        used = data.trained_on()  # only the prompts that the phase comes to are decided
        decided = run.routes([data.train[i] for i in used])
        assert isinstance(decided, FixedRoutes)
        routes = torch.ones(len(data.train), run.model.num_layers, dtype=torch.bool)
        routes[used] = decided.ran
        return FixedRoutes(routes), run.routes(data.val)
    if (shared := run.routes(data.train)) is not None:
        return shared, shared
    if fit is not None:
        router = run.model.routers
        assert isinstance(router, RouteRouter)
        power = fit.draw_power or (1.0 if len({example.part for example in data.train}) > 1 else 0.5)
        means = (read_means(run.prompts(each)) for each in (data.train, data.val))
        drawn, held = (DrawnRoutes(router, each, power) for each in means)
        if not fit.any_speed:
            return drawn.at(range(len(drawn.means)), None), held.at(range(len(held.means)), None)
        spread = torch.linspace(0, router.highest_rate, 5)[1:4]
        return drawn, held.at(range(len(held.means)), spread[torch.arange(len(held.means)) % 3])
    if run.tuned:
        return FixedRoutes(run.prompts(data.train).routed()), FixedRoutes(run.prompts(data.val).routed())
    return None, None


def fit_again(run: Run) -> dict[str, Any]:
    """Fit the routers to the states of the trained model: measure routes again, or keep the decisions of before."""
    if run.method.route_fit() is not None:
        return fit_route_router(run, "refit")
    assert isinstance(run.model.routers, Routers)
    decided = read_own(run.directory / "decided.json", lambda saved: torch.tensor(saved, dtype=torch.bool))
    prompts = run.prompts(run.data.train).take(len(decided))
    return {"kept_decisions": float(fit_to_decisions(prompts, decided))}
