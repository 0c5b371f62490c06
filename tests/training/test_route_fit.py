"""Fitting a route router: regression, prices and codebook against what they should find."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.data.task import Example
from firstlab.methods.objective import RouteFit
from firstlab.model.route_router import RouteRouter
from firstlab.model.settings import RouterSettings
from firstlab.training import route_fit
from firstlab.training.drawn_routes import DrawnRoutes
from firstlab.training.route_fit import (
    Measured,
    Ridge,
    fit_router,
    measure,
    rate_over_tokens,
    static_losses,
    use_static,
)
from firstlab.training.route_search import find_codebook, grown, wanted_sizes

LAYERS, HIDDEN = 8, 4
FIT = RouteFit(target_skip=0.25, highest_skip=0.5, sizes=2, swaps=2, calibration_prompts=8, fit_prompts=400)


@dataclass
class KnownPrompts:
    """Prompts whose loss is the sum of what each skipped layer costs their part."""

    costs: dict[str, list[float]]
    examples: list[Example]
    num_layers: int = LAYERS
    progress_bar: bool = False
    measured: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def texts(self) -> list[str]:
        return [example.source for example in self.examples]

    def select(self, index) -> KnownPrompts:
        return replace(self, examples=[self.examples[i] for i in index])

    def slice(self, start: int, stop: int) -> KnownPrompts:
        return replace(self, examples=self.examples[start:stop])

    def losses_each(self, routes, title=""):
        self.measured.append(len(self) * len(routes))
        costs = torch.tensor([self.costs[example.part] for example in self.examples])
        return 1.0 + costs @ (~routes).float().T

    def mean_losses(self, routes, title=""):
        return self.losses_each(routes).mean(0).tolist()


def known(count: int = 12) -> KnownPrompts:
    costs = {"a": [9, 0.1, 0.2, 0.3, 0.9, 0.9, 0.9, 9], "b": [9, 0.9, 0.9, 0.9, 0.3, 0.2, 0.1, 9]}
    examples = [Example(str(i), f"text {i}", ("r",), part="ab"[i % 2]) for i in range(count)]
    return KnownPrompts(costs, examples)


def measured_prompts(count: int = 400, noise: float = 0.02, signal: float = 1.0, seed: int = 0) -> Measured:
    """Prompts whose harm is linear in what is read, but for noise."""
    generator = torch.Generator().manual_seed(seed)
    router = RouteRouter(LAYERS, HIDDEN)
    features = router.harm_weight.shape[1]
    means = torch.randn(count, features, generator=generator)
    routes = torch.ones(5, LAYERS, dtype=torch.bool)
    for place, skipped in enumerate(([], [1, 2], [5, 6], [1, 2, 3, 4], [3, 4, 5, 6])):
        routes[place, skipped] = False
    weight = signal * 0.1 * torch.randn(features, 5, generator=generator)
    bias = torch.tensor([0.0, 0.2, 0.2, 0.6, 0.6])
    harm = (means @ weight + bias + noise * torch.randn(count, 5, generator=generator)) * (routes.sum(1) < LAYERS)
    tokens = (2.5 + 0.5 * means[:, 0]).exp().round().clamp_min(1)
    return Measured(routes, 1.0 + harm, tokens, means)


@given(st.integers(0, 99), st.sampled_from([0.1, 3.0, 100.0]))
@settings(max_examples=15, deadline=None)
def test_ridge_is_that_of_the_normal_equations(seed, strength):
    torch.manual_seed(seed)
    means, targets = 3 * torch.randn(20, 6) + 5, torch.randn(20, 2)
    weights, bias = Ridge.of(means).solve(targets, strength)
    expected = regressed(means, targets, strength, means)
    torch.testing.assert_close(means.double() @ weights.T + bias, expected, rtol=1e-6, atol=1e-6)


def regressed(means, targets, strength, others):
    """What ridge regression on means and targets expects of others, by the normal equations."""
    mean, scale = means.mean(0), means.std(0) + 1e-6
    scaled, centred = ((means - mean) / scale).double(), (targets - targets.mean(0)).double()
    solved = torch.linalg.solve(scaled.T @ scaled + strength * torch.eye(scaled.shape[1]), scaled.T @ centred)
    return ((others - mean) / scale).double() @ solved + targets.mean(0)


@pytest.mark.parametrize("price", ["length", "tokens"])
def test_a_fit_finds_what_the_prompt_tells_and_meets_rates_over_tokens(price):
    router, measured = RouteRouter(LAYERS, HIDDEN), measured_prompts()
    report = fit_router(router, measured, FIT, price)
    assert report["worth"] and report["gain"] < -0.02
    assert report["harm_r2"] > 0.8 and report["length_r2"] > 0.9
    assert abs(report["skip_rate_by_token"] - 0.25) < 0.03
    assert (router.rates.diff() >= 0).all() and (router.prices.diff() >= 0).all()
    for rate in (0.0, 0.1, 0.25, 0.4):
        chosen = router.choose(measured.means, rate)
        assert abs(rate_over_tokens(router, chosen, measured.tokens) - rate) < 0.05
    chosen = router.choose(measured.means, router.highest_rate)
    assert rate_over_tokens(router, chosen, measured.tokens) == pytest.approx(router.highest_rate, abs=0.02)


@pytest.mark.parametrize("price", ["length", "tokens"])
def test_prices_make_their_rates_on_prompts_that_a_fit_has_not_seen(price):
    router, measured = RouteRouter(LAYERS, HIDDEN), measured_prompts(60, noise=0.3)
    found = fit_router(router, measured, FIT, price)
    harm, length = torch.empty_like(measured.losses, dtype=torch.double), torch.empty(60, dtype=torch.double)
    for quarter in torch.arange(60).split(15):  # in a row, as parts of a mixture take turns
        left, seen = measured.rows(quarter), measured.rows(torch.isin(torch.arange(60), quarter).logical_not())
        targets = seen.harm.clamp(-0.3, found["clip"])
        harm[quarter] = regressed(seen.means, targets, found["harm_ridge"], left.means)
        logs = regressed(seen.means, seen.tokens.log()[:, None], found["length_ridge"], left.means)
        length[quarter] = logs[:, 0].exp()
    for rate, paid in zip(router.rates[1:].tolist(), router.prices[1:].tolist(), strict=True):
        unit = length[:, None] if price == "length" else 1
        prices = (paid - 1e-3 * abs(paid), paid + 1e-3 * abs(paid))
        chosen = ((harm - each * unit * router.skips).argmin(1) for each in prices)
        below, above = (rate_over_tokens(router, each, measured.tokens) for each in chosen)
        assert below - 1e-6 <= rate <= above + 1e-6


def test_long_answers_carry_the_skipping_where_length_is_priced():
    measured = measured_prompts()
    rates = {}
    for price in ("length", "tokens"):
        router = RouteRouter(LAYERS, HIDDEN)
        fit_router(router, measured, FIT, price)
        rates[price] = float(router.skips[router.choose(measured.means)].mean())
    # The same rate over tokens with fewer prompts that skip.
    assert rates["length"] < rates["tokens"]


def test_a_limit_of_harm_holds_at_every_rate():
    measured, router = measured_prompts(), RouteRouter(LAYERS, HIDDEN)
    router.settings = replace(router.settings, max_harm=0.3)
    fit_router(router, measured, FIT, "length")
    assert router.highest_rate < 0.5
    for rate in torch.linspace(0, router.highest_rate, 5).tolist():
        chosen = router.choose(measured.means, rate)
        predicted = router.predicted_harm(measured.means).gather(1, chosen[:, None])
        assert (predicted[chosen > 0] <= 0.3).all()


def test_noise_is_worth_nothing_and_the_static_set_serves_all():
    measured, router = measured_prompts(noise=1.0, signal=0.0), RouteRouter(LAYERS, HIDDEN)
    assert not fit_router(router, measured, FIT, "tokens")["worth"]
    use_static(router, measured, FIT)
    chosen = router.choose(torch.randn(50, measured.means.shape[1]))
    assert len(chosen.unique()) == 1
    assert int((~measured.routes[chosen[0]]).sum()) == 2
    assert len(router.choose(measured.means, 0.0).unique()) == 1
    assert int(router.choose(measured.means, 0.0)[0]) == 0


def test_what_does_not_vary_is_not_told_by_the_prompt():
    measured = measured_prompts(40)
    measured.tokens = torch.full_like(measured.tokens, 5)
    report = fit_router(RouteRouter(LAYERS, HIDDEN), measured, FIT, "length")
    assert report["length_r2"] == 0


def test_a_few_held_out_prompts_prove_nothing():
    measured = measured_prompts(noise=0.05, signal=1.0)
    for count, worth in ((20, False), (40, True)):  # a quarter of them is held out
        report = fit_router(RouteRouter(LAYERS, HIDDEN), measured.rows(torch.arange(count)), FIT, "tokens")
        assert report["gain_interval"][1] < 0 and report["worth"] is worth


def test_the_static_sets_keep_the_limit_of_harm():
    measured = measured_prompts(noise=1.0, signal=0.0)
    harm = measured.harm.mean(0)
    most = float(harm[1:].min() + harm[1:].max()) / 2
    router = RouteRouter(LAYERS, HIDDEN, RouterSettings(kind="routes", max_harm=most))
    use_static(router, measured, FIT)
    left = measured.routes[(harm <= most) | measured.routes.all(1)]
    assert torch.equal(router.codebook.bool(), left) and 1 < len(left) < len(measured.routes)
    assert router.highest_rate == pytest.approx(float(router.skips.max()))
    assert float(router.default_rate) <= router.highest_rate


def test_static_sets_between_two_sizes_are_their_mixture():
    measured = measured_prompts()
    two, four = ([1, 2], [3, 4])
    best = [min(each, key=lambda k: float(measured.losses[:, k].mean())) for each in (two, four)]
    middle = (measured.losses[:, best[0]] + measured.losses[:, best[1]]) / 2
    torch.testing.assert_close(static_losses(measured, 3 / LAYERS), middle)
    torch.testing.assert_close(static_losses(measured, 0.25), measured.losses[:, best[0]])
    torch.testing.assert_close(static_losses(measured, 0.0), measured.losses[:, 0])


def test_the_codebook_holds_the_sets_of_the_whole_and_of_each_part():
    prompts = known()
    sets = {tuple((~route).nonzero()[:, 0].tolist()) for route in find_codebook(prompts, FIT)}
    assert () in sets
    assert {(1, 2), (5, 6), (1, 2, 3), (4, 5, 6)} & sets >= {(1, 2), (5, 6)}  # what each part loses least by
    assert (1, 6) in sets  # and both together
    sizes = {len(each) for each in sets}
    assert sizes == {0, 1, 2, 3, 4} >= set(wanted_sizes(LAYERS, FIT))
    assert all(0 not in each and LAYERS - 1 not in each for each in sets)


def test_more_sets_are_found_for_the_prompts_that_lose_most():
    prompts, router = known(), RouteRouter(LAYERS, HIDDEN)
    routes = torch.ones(2, LAYERS, dtype=torch.bool)
    routes[1, [1, 2]] = False  # which costs part b most
    means = torch.randn(len(prompts), router.harm_weight.shape[1])
    measured = Measured(routes, prompts.losses_each(routes), torch.ones(len(prompts)), means)
    use_static(router, measured, FIT)
    more = grown(measured, router, prompts, replace(FIT, calibration_prompts=4))
    assert (5, 6) in {tuple((~route).nonzero()[:, 0].tolist()) for route in more}


def test_a_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(route_fit, "read_means", lambda prompts: torch.zeros(len(prompts), 3))
    monkeypatch.setattr(
        KnownPrompts, "_rows", property(lambda self: [_Row([0, 1]) for _ in self.examples]), raising=False
    )
    routes = torch.ones(3, LAYERS, dtype=torch.bool)
    routes[1, 1] = routes[2, 2] = False
    whole = measure(known(), routes, tmp_path / "a", chunk=4)
    torn = measure(known(), routes, tmp_path / "b", chunk=4)
    file = next(tmp_path.glob("b.*.jsonl"))
    lines = file.read_text().splitlines()
    file.write_text(lines[0] + "\n" + lines[1][:30])
    prompts = known()
    again = measure(prompts, routes, tmp_path / "b", chunk=4)
    assert prompts.measured == [12, 12]
    assert torch.equal(again.losses, whole.losses) and torch.equal(torn.losses, whole.losses)
    other = known()
    measure(other, ~routes | routes, tmp_path / "b", chunk=4)  # other routes are measured anew
    assert len(other.measured) == 3


@dataclass
class _Row:
    response: list[int]


def test_drawn_routes_cover_all_speeds_and_follow_the_seed(monkeypatch):
    router, measured = RouteRouter(LAYERS, HIDDEN), measured_prompts()
    fit_router(router, measured, FIT, "tokens")
    drawn = DrawnRoutes(router, measured.means)
    torch.manual_seed(5)
    first = drawn.rows(range(8)).ran
    torch.manual_seed(5)
    assert torch.equal(drawn.rows(range(8)).ran, first)
    assert first.all(1).any()  # a dense one in every batch
    torch.manual_seed(6)
    counts = torch.stack([(~drawn.rows(range(16)).ran).sum(1).float().mean() for _ in range(20)])
    assert 0 < counts.mean() < LAYERS * router.highest_rate
    fixed = drawn.at([3, 4], torch.tensor([0.0, router.highest_rate])).ran
    assert fixed[0].all() and not fixed[1].all()
    monkeypatch.setattr(DrawnRoutes, "at", lambda self, index, rates: rates)
    for power in (1.0, 0.5):
        rates = DrawnRoutes(router, measured.means, power).rows(range(17)).sort().values / router.highest_rate
        assert rates[[0, 8, 16]].tolist() == pytest.approx([0, 0.5**power, 1])
