"""Fit a `RouteRouter`: find a codebook of routes, measure what each costs many prompts, predict it from the prompt.

Shapes: N prompts, K routes, L layers, F features.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from firstlab.methods.objective import RouteFit
from firstlab.model.route_router import RouteRouter
from firstlab.store.ranks import barrier, rank
from firstlab.training.prompt_set import PromptSet, check_finite

# A prompt's harm below this is noise of a lucky answer.
_LEAST_HARM = -0.3
_CLIPS = (0.5, 1.0, 2.0, 4.0)
_RIDGES = tuple(10.0**power for power in range(0, 7))
_HELD_OUT = 0.25
_RATES = 33
# A fit is chosen by what it loses at these multiples of the wanted rate.
_RATES_OF_INTEREST = (0.6, 1.0, 1.4)
_BISECTIONS = 40
_RESAMPLES = 2000


@dataclass
class Measured:
    """What is known about N prompts.

    Attributes:
        routes: [K, L] boolean; the first is dense.
        losses: [N, K] per response token.
        tokens: [N] response lengths.
        means: [N, F], what the router reads.
    """

    routes: Tensor
    losses: Tensor
    tokens: Tensor
    means: Tensor

    @property
    def harm(self) -> Tensor:
        """[N, K], the rise above the dense loss."""
        return self.losses - self.losses[:, :1]

    def rows(self, index: Tensor) -> Measured:
        """Some of the prompts."""
        return Measured(self.routes, self.losses[index], self.tokens[index], self.means[index])


# -- measuring --


def measure(prompts: PromptSet, routes: Tensor, file: Path | None = None, chunk: int = 64) -> Measured:
    """Measure N prompts under K routes, a chunk of prompts at a time.

    Args:
        prompts: The prompts.
        routes: [K, L].
        file: Where each chunk's losses are kept, so that an interrupted measurement goes on; None keeps nothing. The
            processes of one run share the chunks.
        chunk: Prompts in a chunk.
    """
    my_rank, world = rank()
    starts = list(range(0, len(prompts), chunk))
    found: dict[int, Tensor] = {}
    own = None if file is None else file.with_suffix(f".{my_rank}.jsonl")
    key = hashlib.sha256(json.dumps([routes.tolist(), list(prompts.texts)]).encode()).hexdigest()[:16]
    if file is not None:
        found = _read_chunks(file, key)
    left = [start for start in starts if start not in found]
    mine = left[my_rank::world] if file is not None else left
    for start in tqdm(mine, desc=f"measure {len(routes)} routes", unit="chunk", disable=not prompts.progress_bar):
        part = prompts.slice(start, start + chunk)
        part.progress_bar = False
        losses = part.losses_each(routes)
        found[start] = losses
        if own is not None:
            own.parent.mkdir(parents=True, exist_ok=True)
            with own.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "start": start, "losses": losses.tolist()}) + "\n")
    if file is not None and world > 1:
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


@dataclass
class Choice:
    """What a fit is made of: strengths of the ridges, the bound of a prompt's harm, the price."""

    harm_ridge: float
    length_ridge: float
    clip: float
    price: str


def fit_router(router: RouteRouter, measured: Measured, fit: RouteFit, price: str) -> dict[str, Any]:
    """Fit a router with a given price to measured prompts; returns the diagnostics of held-out ones.

    The last quarter of the prompts is held out: it decides the strength of the ridges and the bound of a prompt's harm,
    gives the table of prices, and tells what the fit is worth. The weights are then fitted to all prompts.

    Args:
        router: Changed in place.
        measured: Of the prompts, in an order that is not sorted by anything.
        fit: The method's.
        price: "length", "tokens" or "size".
    """
    count = len(measured.tokens)
    cut = count - max(1, round(_HELD_OUT * count))
    seen, held = measured.rows(torch.arange(cut)), measured.rows(torch.arange(cut, count))
    ridge = Ridge.of(seen.means)
    length_ridge = min(_RIDGES, key=lambda strength: _length_error(ridge, seen, held, strength))
    best: tuple[float, Choice] | None = None
    for clip in _CLIPS:
        for strength in _RIDGES:
            choice = Choice(strength, length_ridge, clip, price)
            _set(router, ridge, seen, choice)
            score = _regret(router, held, fit)
            if best is None or score < best[0]:
                best = score, choice
    assert best is not None
    _, choice = best
    _set(router, ridge, seen, choice)
    _solve_prices(router, held, fit)
    report = _diagnose(router, held, fit) | {
        "harm_ridge": choice.harm_ridge, "length_ridge": choice.length_ridge, "clip": choice.clip,
        "price": price, "prompts": count, "held_out": len(held.tokens), "routes": len(measured.routes),
    }  # fmt: skip
    _set(router, Ridge.of(measured.means), measured, choice)
    return report


def use_static(router: RouteRouter, measured: Measured, fit: RouteFit) -> None:
    """Let every prompt have the best set of the size nearest to the wanted rate, whatever it says."""
    router.settings = replace(router.settings, price="size", max_harm=None)
    means = measured.harm.mean(0)
    router.set_fit(
        codebook=measured.routes.float(),
        harm_weight=torch.zeros(len(means), measured.means.shape[1]),
        harm_bias=means,
        length_weight=torch.zeros(measured.means.shape[1]),
        length_bias=torch.zeros(()),
        **_grid(float((~measured.routes).float().mean(1).max())),
        default_rate=torch.tensor(fit.skip_rate),
    )


def _grid(highest: float) -> dict[str, Tensor]:
    return {"rates": torch.linspace(0, highest, 2), "prices": torch.zeros(2)}


def _targets(measured: Measured, clip: float) -> Tensor:
    return measured.harm.clamp(_LEAST_HARM, clip)


def _length_error(ridge: Ridge, seen: Measured, held: Measured, strength: float) -> float:
    weights, bias = ridge.solve(seen.tokens.log().unsqueeze(1), strength)
    return float(((held.means.double() @ weights.T + bias).squeeze(1) - held.tokens.double().log()).square().mean())


def _set(router: RouteRouter, ridge: Ridge, measured: Measured, choice: Choice) -> None:
    """Put a fit into the router, but for its prices."""
    harm_weight, harm_bias = ridge.solve(_targets(measured, choice.clip), choice.harm_ridge)
    length_weight, length_bias = ridge.solve(measured.tokens.log().unsqueeze(1), choice.length_ridge)
    router.settings = replace(router.settings, price=choice.price)
    router.set_fit(
        codebook=measured.routes.float(),
        harm_weight=harm_weight,
        harm_bias=harm_bias,
        length_weight=length_weight[0],
        length_bias=length_bias[0],
    )


def rate_over_tokens(router: RouteRouter, chosen: Tensor, tokens: Tensor) -> float:
    """Skipped layers ÷ L, mean over response tokens, when prompts take the chosen routes."""
    return float((router.skips.cpu()[chosen] * tokens).sum() / tokens.sum())


@dataclass
class _Predicted:
    """What a router expects of held-out prompts, so that many prices can be tried.

    Attributes:
        router: With the fit.
        harm, length: [N, K] and [N].
        tokens: [N], the lengths that came true.
    """

    router: RouteRouter
    harm: Tensor
    length: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, router: RouteRouter, held: Measured) -> _Predicted:
        means = held.means.to(router.device)
        return cls(router, router.predicted_harm(means), router.predicted_length(means), held.tokens)

    def choose(self, price: float) -> Tensor:
        """[N], routes at a price of time."""
        nothing = self.harm.new_zeros(())
        return self.router.cheapest(self.harm, self.length, nothing, self.harm.new_tensor(price)).cpu()

    def rate(self, price: float) -> float:
        """The skip rate over tokens that a price makes."""
        return rate_over_tokens(self.router, self.choose(price), self.tokens)

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


def _solve_prices(router: RouteRouter, held: Measured, fit: RouteFit) -> None:
    """The table from skip rate over tokens to price, by bisection on held-out prompts."""
    if router.settings.price == "size":
        router.set_fit(**_grid(float(router.skips.max())), default_rate=torch.tensor(fit.skip_rate))
        return
    predicted = _Predicted.of(router, held)
    least, most = predicted.ends()
    highest = predicted.rate(most)
    rates, prices = [0.0], [least]
    for wanted in torch.linspace(0, highest, _RATES)[1:].tolist():
        prices.append(predicted.solve(wanted, prices[-1], most))
        rates.append(wanted)
    router.set_fit(
        rates=torch.tensor(rates), prices=torch.tensor(prices), default_rate=torch.tensor(min(fit.skip_rate, highest))
    )


def _regret(router: RouteRouter, held: Measured, fit: RouteFit) -> float:
    """The loss that skipping adds on held-out prompts, mean over a few rates; what a fit is chosen by."""
    predicted = _Predicted.of(router, held)
    by_size = router.settings.price == "size"
    least, most = (0.0, 0.0) if by_size else predicted.ends()
    highest = float(router.skips.max()) if by_size else predicted.rate(most)
    found = []
    for share in _RATES_OF_INTEREST:
        rate = min(share * fit.skip_rate, highest)
        if by_size:
            router.set_fit(**_grid(highest))
            chosen = router.choose(held.means.to(router.device), rate).cpu()
        else:
            chosen = predicted.choose(predicted.solve(rate, least, most))
        # At equal rates: what the static sets lose at the rate that came out is taken off.
        reached = rate_over_tokens(router, chosen, held.tokens)
        lost = held.losses.gather(1, chosen[:, None])[:, 0] - static_losses(held, reached)
        found.append(float((lost * _weights(held, router.settings.price)).sum()))
    return sum(found)


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


def _diagnose(router: RouteRouter, held: Measured, fit: RouteFit) -> dict[str, Any]:
    """What the fit is worth on held-out prompts at the method's rate."""
    means = held.means.to(router.device)
    harm = held.harm[:, 1:]
    predicted = router.predicted_harm(means).cpu()[:, 1:]
    constant = router.predicted_harm(means).mean(0).cpu()[1:]
    log_tokens = held.tokens.log()
    chosen = router.choose(means).cpu()
    reached = rate_over_tokens(router, chosen, held.tokens)
    routed, static = held.losses.gather(1, chosen[:, None])[:, 0], static_losses(held, reached)
    low, high = _interval(routed - static, _weights(held, router.settings.price))
    weights = _weights(held, router.settings.price)
    dense = float((held.losses[:, 0] * weights).sum())
    return {
        "harm_r2": _r2(harm, predicted, constant),
        "length_r2": _r2(log_tokens, router.predicted_length(means).cpu().log(), log_tokens.mean()),
        "routes_used": int(chosen.unique().numel()),
        "skip_rate": float(router.skips.cpu()[chosen].mean()),
        "skip_rate_by_token": reached,
        "dense_loss": dense,
        "static_loss": float((static * weights).sum()),
        "routed_loss": float((routed * weights).sum()),
        "gain": float(((routed - static) * weights).sum()),
        "gain_interval": [low, high],
        "predicted_harm": float((router.predicted_harm(means).cpu().gather(1, chosen[:, None])[:, 0] * weights).sum()),
        "measured_harm": float(((routed - held.losses[:, 0]) * weights).sum()),
        "highest_rate": router.highest_rate,
        "worth": high < 0,
    }


def _r2(values: Tensor, predicted: Tensor, constant: Tensor) -> float:
    """Share of the variance around a constant that the prediction explains, all columns together."""
    return float(1 - (values - predicted).square().sum() / (values - constant).square().sum().clamp_min(1e-12))


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
