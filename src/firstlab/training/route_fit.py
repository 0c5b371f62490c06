"""Fit a `RouteRouter`: find a codebook of routes, measure what each costs many prompts, predict it from the prompt.

Shapes: N prompts, K routes, L layers, F features.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from firstlab.methods.objective import RouteFit
from firstlab.model.route_router import RouteRouter
from firstlab.store.ranks import barrier, rank
from firstlab.store.results import rate_by_token
from firstlab.training.prompt_set import PromptSet, check_finite

# A prompt's harm below this is noise of a lucky answer.
_LEAST_HARM = -0.3
_CLIPS = (0.5, 1.0, 2.0, 4.0)
_RIDGES = tuple(10.0**power for power in range(0, 7))
_HELD_OUT = 0.25
#: Fewer held-out prompts agree by chance more often than once in twenty times.
ENOUGH_HELD_OUT = 6
_RATES = 33
#: A fit and its price are chosen by what is lost at these multiples of the wanted rate.
RATES_OF_INTEREST = (0.6, 1.0, 1.4)
_BISECTIONS = 40
_RESAMPLES = 2000


@dataclass
class Measured:
    """What is known about N prompts."""

    routes: Tensor  # [K, L] boolean; the first is dense
    losses: Tensor  # [N, K] per response token
    tokens: Tensor  # [N], response lengths
    means: Tensor  # [N, F], what the router reads

    @property
    def harm(self) -> Tensor:
        """[N, K], the rise above the dense loss."""
        return self.losses - self.losses[:, :1]

    @cached_property
    def ridge(self) -> Ridge:
        return Ridge.of(self.means)

    @cached_property
    def quarters(self) -> list[tuple[Measured, Measured]]:
        """Each quarter of the prompts, behind the three others."""
        # In a row: parts of a mixture take turns.
        quarter = torch.arange(len(self.tokens)) * 4 // len(self.tokens)
        return [(self.rows(quarter != each), self.rows(quarter == each)) for each in quarter.unique()]

    def rows(self, index: Tensor) -> Measured:
        """Some of the prompts."""
        return Measured(self.routes, self.losses[index], self.tokens[index], self.means[index])


# -- measuring --


def measure(prompts: PromptSet, routes: Tensor, file: Path, chunk: int = 64) -> Measured:
    """Measure N prompts under routes [K, L], `chunk` prompts at a time.

    The losses of each chunk are kept in files beside `file`, so that an interrupted measurement goes on. The processes
    of one run share the chunks.
    """
    my_rank, world = rank()
    key = hashlib.sha256(json.dumps([routes.tolist(), list(prompts.texts)]).encode()).hexdigest()[:16]
    starts, found, own = range(0, len(prompts), chunk), _read_chunks(file, key), file.with_suffix(f".{my_rank}.jsonl")
    mine = [start for start in starts if start not in found][my_rank::world]
    own.parent.mkdir(parents=True, exist_ok=True)
    for start in tqdm(mine, desc=f"measure {len(routes)} routes", unit="chunk", disable=not prompts.progress_bar):
        part = prompts.slice(start, start + chunk)
        part.progress_bar = False
        found[start] = part.losses_each(routes)
        with own.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"key": key, "start": start, "losses": found[start].tolist()}) + "\n")
    if world > 1:
        barrier()
        found = _read_chunks(file, key)
    losses = torch.cat([found[start] for start in starts])
    tokens = torch.tensor([len(row.response) for row in prompts._rows], dtype=torch.float32)
    return Measured(routes, losses, tokens, read_means(prompts))


def _read_chunks(file: Path, key: str) -> dict[int, Tensor]:
    """Chunks that are on disk; a line that a kill has cut off is measured again."""
    found = {}
    for part in sorted(file.parent.glob(f"{file.stem}.*.jsonl")):
        for line in part.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
                if row["key"] == key:
                    found[int(row["start"])] = torch.tensor(row["losses"])
            except (ValueError, LookupError, TypeError):
                continue
    return found


@torch.no_grad()
def read_means(prompts: PromptSet) -> Tensor:
    """[N, F], what the route router reads in each prompt."""
    with prompts.model.lora_disabled():
        means = [prompts.model.prompt_means(batch["input_ids"], batch["prompt_mask"]) for batch in prompts.batches]
    found = torch.cat(means).cpu()
    check_finite(found, "mean states of prompts")
    return found


# -- fitting --


@dataclass
class Ridge:
    """Ridge regression of many targets for several strengths, from one decomposition of the N × N products."""

    mean: Tensor
    scale: Tensor
    rows: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, means: Tensor) -> Ridge:
        """Decompose [N, F] features, each brought to mean 0 and deviation 1."""
        features = means.double()
        mean, scale = features.mean(0), features.std(0) + 1e-6
        rows = (features - mean) / scale
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        return cls(mean, scale, rows, values.clamp_min(0), vectors)

    def solve(self, targets: Tensor, strength: float) -> tuple[Tensor, Tensor]:
        """(weights [K, F], bias [K]) on unscaled features for targets [N, K]."""
        centre = targets.double().mean(0)
        dual = self.vectors @ ((self.vectors.T @ (targets.double() - centre)) / (self.values + strength).unsqueeze(1))
        weights = (self.rows.T @ dual).T / self.scale
        return weights, centre - weights @ self.mean


class Choice(NamedTuple):
    """What a fit is made of: the bound of a prompt's harm, the strengths of the ridges, the price."""

    clip: float
    harm_ridge: float
    length_ridge: float
    price: str


def fit_router(router: RouteRouter, measured: Measured, fit: RouteFit, price: str) -> dict[str, Any]:
    """Fit a router with a given price to measured prompts, which nothing sorts; returns diagnostics of held-out ones.

    The last quarter of the prompts is held out: it decides the strength of the ridges and the bound of a prompt's harm,
    and tells what the fit is worth. The weights are then fitted to all prompts. The table of prices is solved on all of
    them, too, each as fits see it that have not seen its quarter.
    """
    count = len(measured.tokens)
    cut = count - max(1, round(_HELD_OUT * count))
    seen, held = measured.rows(torch.arange(cut)), measured.rows(torch.arange(cut, count))
    length_ridge = min(_RIDGES, key=lambda strength: _length_error(seen, held, strength))

    def regret(choice: Choice) -> float:
        _set(router, seen, choice)
        return _regret(router, held, fit)

    choice = min((Choice(*each, length_ridge, price) for each in product(_CLIPS, _RIDGES)), key=regret)
    _set(router, seen, choice)
    _solve_prices(_Predicted.of(router, held), fit)
    sizes = {"prompts": count, "held_out": len(held.tokens), "routes": len(measured.routes)}
    report = _diagnose(router, held) | choice._asdict() | sizes
    unseen = _unseen(router, measured, choice)
    _set(router, measured, choice)
    _solve_prices(unseen, fit)
    return report | {"highest_rate": router.highest_rate}


def _unseen(router: RouteRouter, measured: Measured, choice: Choice) -> _Predicted:
    """What is expected of every prompt by a fit to the other quarters."""
    parts = []
    for others, quarter in measured.quarters:
        _set(router, others, choice)
        parts.append(_Predicted.of(router, quarter))
    harm, length, tokens = (torch.cat([getattr(part, name) for part in parts]) for name in ("harm", "length", "tokens"))
    return _Predicted(router, harm, length, tokens)


def use_static(router: RouteRouter, measured: Measured, fit: RouteFit) -> None:
    """Let every prompt have the best set of the size nearest to the wanted rate, whatever it says.

    Sets that harm prompts more than `max_harm` on average are left out.
    """
    most = router.settings.max_harm
    harm, routes = measured.harm.mean(0), measured.routes
    if most is not None:
        allowed = (harm <= most) | routes.all(1)
        harm, routes = harm[allowed], routes[allowed]
    router.settings = replace(router.settings, price="size")
    features, highest = measured.means.shape[1], float((~routes).float().mean(1).max())
    router.set_fit(
        codebook=routes.float(),
        harm_weight=torch.zeros(len(routes), features),
        harm_bias=harm,
        length_weight=torch.zeros(features),
        length_bias=torch.zeros(()),
        **_grid(highest),
        default_rate=torch.tensor(min(fit.target_skip, highest)),
    )


def _grid(highest: float) -> dict[str, Tensor]:
    return {"rates": torch.linspace(0, highest, 2), "prices": torch.zeros(2)}


def _length_error(seen: Measured, held: Measured, strength: float) -> float:
    weights, bias = seen.ridge.solve(seen.tokens.log().unsqueeze(1), strength)
    return float(((held.means.double() @ weights.T + bias).squeeze(1) - held.tokens.double().log()).square().mean())


def _set(router: RouteRouter, measured: Measured, choice: Choice) -> None:
    """Put a fit into the router, but for its prices."""
    harm_weight, harm_bias = measured.ridge.solve(measured.harm.clamp(_LEAST_HARM, choice.clip), choice.harm_ridge)
    length_weight, length_bias = measured.ridge.solve(measured.tokens.log().unsqueeze(1), choice.length_ridge)
    router.settings = replace(router.settings, price=choice.price)
    router.set_fit(
        codebook=measured.routes.float(),
        harm_weight=harm_weight,
        harm_bias=harm_bias,
        length_weight=length_weight[0],
        length_bias=length_bias[0],
    )


def rate_over_tokens(router: RouteRouter, chosen: Tensor, tokens: Tensor) -> float:
    """Skipped layers ÷ L, mean over the decode steps of responses, when prompts take the chosen routes."""
    return rate_by_token(router.skips.cpu()[chosen].numpy(), tokens.numpy())


@dataclass
class _Predicted:
    """What a router expects of held-out prompts, so that many rates and prices can be tried."""

    router: RouteRouter
    harm: Tensor  # [N, K]
    length: Tensor  # [N]
    tokens: Tensor  # [N], the lengths that came true

    @classmethod
    def of(cls, router: RouteRouter, held: Measured) -> _Predicted:
        means = held.means.to(router.device)
        return cls(router, router.predicted_harm(means), router.predicted_length(means), held.tokens)

    def choose(self, price: float, rate: float = 0.0) -> Tensor:
        """[N], routes at a price of time, or where there is none at a rate."""
        return self.router.cheapest(self.harm, self.length, *self.harm.new_tensor([rate, price])).cpu()

    def rate(self, price: float) -> float:
        """The skip rate over tokens that a price makes."""
        return rate_over_tokens(self.router, self.choose(price), self.tokens)

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Prices that make the lowest and the highest rate there is.

        The lower one is negative where routes are expected to help: whoever asks for dense decoding gets it.
        """
        low = 0.0 if self.rate(0.0) == 0 else -1.0
        while self.rate(low) > 0 and low > -1e9:
            low *= 8
        high = 1.0
        while self.rate(high) < self.rate(8 * high) - 1e-6 and high < 1e9:
            high *= 8
        return low, high

    def solve(self, wanted: float, low: float, high: float) -> float:
        """The least price between two that makes the wanted rate."""
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.rate(middle) < wanted - 1e-9 else (low, middle)
        return high

    def choose_at(self, wanted: float) -> Tensor:
        """[N], the routes that make a rate, or the highest there is."""
        if self.router.settings.price == "size":
            return self.choose(0.0, min(wanted, float(self.router.skips.max())))
        least, most = self.ends
        return self.choose(self.solve(min(wanted, self.rate(most)), least, most))


def _solve_prices(predicted: _Predicted, fit: RouteFit) -> None:
    """The table from skip rate over tokens to price, by bisection on prompts that the predictions have not seen."""
    router = predicted.router
    if router.settings.price == "size":
        router.set_fit(**_grid(float(router.skips.max())), default_rate=torch.tensor(fit.target_skip))
        return
    least, most = predicted.ends
    highest = predicted.rate(most)
    rates, prices = torch.linspace(0, highest, _RATES), [least]
    for wanted in rates[1:].tolist():
        prices.append(predicted.solve(wanted, prices[-1], most))
    router.set_fit(rates=rates, prices=torch.tensor(prices), default_rate=torch.tensor(min(fit.target_skip, highest)))


def _regret(router: RouteRouter, held: Measured, fit: RouteFit) -> float:
    """The loss that skipping adds on held-out prompts, mean over a few rates; what a fit is chosen by."""
    predicted, weights = _Predicted.of(router, held), _weights(held, router.settings.price)
    chosen = (predicted.choose_at(share * fit.target_skip) for share in RATES_OF_INTEREST)
    compared = (_compared(router, held, each) for each in chosen)
    return sum(float(((routed - static) * weights).sum()) for routed, static, _ in compared)


def _compared(router: RouteRouter, held: Measured, chosen: Tensor) -> tuple[Tensor, Tensor, float]:
    """Losses [N] under the chosen routes and under the static sets at the same rate, and that rate over tokens."""
    reached = rate_over_tokens(router, chosen, held.tokens)
    return held.losses.gather(1, chosen[:, None])[:, 0], static_losses(held, reached), reached


def _weights(held: Measured, price: str) -> Tensor:
    """Tokens count where the price is per token, else prompts do."""
    weights = held.tokens if price == "tokens" else torch.ones_like(held.tokens)
    return weights / weights.sum()


def static_losses(measured: Measured, rate: float) -> Tensor:
    """[N] loss of each prompt under one set for all at this rate: between two sizes, their mixture."""
    best: dict[int, int] = {}
    means, sizes = measured.losses.mean(0), (~measured.routes).sum(1).tolist()
    for place, size in enumerate(sizes):
        if size not in best or means[place] < means[best[size]]:
            best[size] = place
    count = rate * measured.routes.shape[1]
    below = max(size for size in best if size <= count + 1e-6)
    above = min((size for size in best if size >= count - 1e-6), default=below)
    share = 0.0 if above == below else (count - below) / (above - below)
    return torch.lerp(measured.losses[:, best[below]], measured.losses[:, best[above]], share)


def _diagnose(router: RouteRouter, held: Measured) -> dict[str, Any]:
    """What the fit is worth on held-out prompts at the method's rate."""
    means, weights, log_tokens = held.means.to(router.device), _weights(held, router.settings.price), held.tokens.log()
    predicted, length = router.predicted_harm(means).cpu(), router.predicted_length(means).cpu()
    chosen = router.choose(means).cpu()
    routed, static, reached = _compared(router, held, chosen)
    low, high = _interval(routed - static, weights)

    def mean(values: Tensor) -> float:
        return float((values * weights).sum())

    return {
        "harm_r2": _r2(held.harm[:, 1:], predicted[:, 1:], predicted.mean(0)[1:]),
        "length_r2": _r2(log_tokens, length.log(), log_tokens.mean()),
        "routes_used": int(chosen.unique().numel()),
        "skip_rate": float(router.skips.cpu()[chosen].mean()),
        "skip_rate_by_token": reached,
        "dense_loss": mean(held.losses[:, 0]),
        "static_loss": mean(static),
        "routed_loss": mean(routed),
        "gain": mean(routed - static),
        "gain_interval": [low, high],
        "predicted_harm": mean(predicted.gather(1, chosen[:, None])[:, 0]),
        "measured_harm": mean(routed - held.losses[:, 0]),
        "worth": high < 0 and len(routed) >= ENOUGH_HELD_OUT,
    }


def _r2(values: Tensor, predicted: Tensor, constant: Tensor) -> float:
    """Share of the variance around a constant that the prediction explains, all columns together; 0 without any."""
    variance = float((values - constant).square().sum())
    return 1 - float((values - predicted).square().sum()) / variance if variance > 1e-9 else 0.0


def _interval(differences: Tensor, weights: Tensor) -> tuple[float, float]:
    """Paired bootstrap interval of a weighted mean of differences [N]."""
    generator = np.random.default_rng(0)
    rows = generator.integers(len(differences), size=(_RESAMPLES, len(differences)))
    values, shares = differences.double().numpy()[rows], weights.double().numpy()[rows]
    low, high = np.quantile((values * shares).sum(1) / shares.sum(1), [0.025, 0.975])
    return float(low), float(high)


def extend(measured: Measured, more: Measured) -> Measured:
    """The same prompts under further routes."""
    routes, losses = torch.cat([measured.routes, more.routes]), torch.cat([measured.losses, more.losses], 1)
    return Measured(routes, losses, measured.tokens, measured.means)
