import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.model.routers import (
    Routers,
    RouterSettings,
    decide,
    mix,
    pool,
    probabilities_of,
    straight_through,
    token_readings,
)


def token_probabilities(hidden: torch.Tensor, weight: torch.Tensor, input_norm: str = "none") -> torch.Tensor:
    return probabilities_of(token_readings(hidden, weight, input_norm), hidden.shape[-1])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_token_probabilities_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]])
    weight = torch.tensor([0.5, 0.25])
    expected = torch.tensor([[sigmoid(1.0), sigmoid(-0.25)]])
    torch.testing.assert_close(token_probabilities(hidden, weight), expected)


def test_rms_input_norm_by_hand_and_scale_free():
    hidden = torch.tensor([[[3.0, 4.0]]])
    weight = torch.tensor([1.0, 1.0])
    expected = torch.tensor([[sigmoid(7 / math.sqrt(12.5))]])
    torch.testing.assert_close(token_probabilities(hidden, weight, "rms"), expected)
    torch.testing.assert_close(token_probabilities(100 * hidden, weight, "rms"), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_norm", ["none", "rms"])
def test_half_precision_hidden_states_are_read_in_fp32(dtype, input_norm):
    hidden = torch.randn(2, 3, 64).to(dtype)
    weight = torch.randn(64)
    probabilities = token_probabilities(hidden, weight, input_norm)
    assert probabilities.dtype == torch.float32
    assert torch.equal(probabilities, token_probabilities(hidden.float(), weight, input_norm))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_probabilities(hidden, weight, input_norm), probabilities)


def test_rms_input_norm_has_the_gradient_of_the_mean_of_squares():
    hidden = torch.randn(2, 3, 8, dtype=torch.float32, requires_grad=True)
    with torch.no_grad():
        hidden[0, 0] = 0
    weight = torch.randn(8, requires_grad=True)
    token_probabilities(hidden, weight, "rms").sum().backward()
    got = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    torch.sigmoid((hidden * weight).sum(-1) / (hidden.square().mean(-1) + 1e-6).sqrt()).sum().backward()
    torch.testing.assert_close(got, (hidden.grad, weight.grad))


@pytest.mark.parametrize("input_norm", ["none", "rms"])
def test_sums_of_all_layers_are_those_of_each(input_norm):
    routers = Routers(4, 8, RouterSettings(input_norm))
    states = torch.randn(4, 2, 5, 8)
    states[:, 1, :2] = float("nan")  # padding
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]]).bool()
    sums = routers.sums([routers.readings(each, layer) for layer, each in enumerate(states)], mask)
    means = [pool(routers.probabilities(each, layer), mask) for layer, each in enumerate(states)]
    torch.testing.assert_close(sums / torch.tensor([[5], [3]]), torch.stack(means, 1))


def test_pool_by_hand():
    p = torch.tensor([[0.2, 0.4, 0.9], [0.1, 0.5, 0.7], [0.3, 0.3, 0.3]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    torch.testing.assert_close(pool(p, mask), torch.tensor([0.3, 0.7, 0.0]))


def test_pool_ignores_what_stands_in_the_padding():
    p = torch.tensor([[float("nan"), 0.25, 0.75]], requires_grad=True)
    rho = pool(p, torch.tensor([[False, True, True]]))
    torch.testing.assert_close(rho, torch.tensor([0.5]))
    rho.sum().backward()
    assert torch.equal(p.grad, torch.tensor([[0.0, 0.5, 0.5]]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=12), st.randoms())
def test_pool_properties(tokens, random):
    p = torch.tensor([[value for value, _ in tokens]])
    mask = torch.tensor([[counts for _, counts in tokens]])
    rho = pool(p, mask)
    counted = [value for value, counts in tokens if counts]
    expected = sum(counted) / len(counted) if counted else 0.0
    assert rho.item() == pytest.approx(expected, abs=1e-6)
    if counted:
        assert min(counted) - 1e-6 <= rho.item() <= max(counted) + 1e-6
    # Order, padding on either side, and neighbours in the batch do not matter.
    order = list(range(len(tokens)))
    random.shuffle(order)
    torch.testing.assert_close(pool(p[:, order], mask[:, order]), rho)
    padding = torch.full((1, 3), 0.9)
    for pieces in ((padding, p), (p, padding)):
        masks = [torch.zeros(1, 3, dtype=torch.bool) if x is padding else mask for x in pieces]
        torch.testing.assert_close(pool(torch.cat(pieces, 1), torch.cat(masks, 1)), rho)
    both = pool(torch.cat([p, 1 - p]), torch.cat([mask, mask]))
    torch.testing.assert_close(both[:1], rho)


@pytest.mark.parametrize(("rho", "route"), [(0.5, True), (0.4999, False), (0.5001, True), (0.0, False), (1.0, True)])
def test_decide_runs_the_layer_from_the_threshold_on(rho, route):
    assert decide(torch.tensor(rho)).item() is route


def test_decide_uses_the_threshold_of_the_settings():
    routers = Routers(2, 4, RouterSettings(threshold=0.7))
    assert routers.decide(torch.tensor([[0.6, 0.7]])).tolist() == [[False, True]]


def test_straight_through_is_hard_forward_and_identity_backward():
    rho = torch.tensor([0.2, 0.8], requires_grad=True)
    gate = straight_through(rho, decide(rho))
    assert gate.tolist() == [0.0, 1.0]
    (gate * torch.tensor([3.0, 5.0])).sum().backward()
    assert rho.grad.tolist() == [3.0, 5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mix_is_exact_at_zero_and_one(dtype):
    hidden = (torch.randn(2, 3, 16) * 1000).to(dtype)
    output = torch.randn(2, 3, 16).to(dtype)
    assert torch.equal(mix(hidden, output, torch.zeros(2, 3)), hidden)
    assert torch.equal(mix(hidden, output, torch.ones(2, 3)), output)


def test_mix_by_hand_per_token():
    hidden = torch.tensor([[[0.0], [10.0]]])
    output = torch.tensor([[[4.0], [20.0]]])
    mixed = mix(hidden, output, torch.tensor([[0.25, 0.5]]))
    torch.testing.assert_close(mixed, torch.tensor([[[1.0], [15.0]]]))


def test_mix_gradient_of_the_gate_is_the_layer_update():
    hidden, output = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    gate = torch.tensor([[0.3, 0.6]], requires_grad=True)
    mix(hidden, output, gate).sum().backward()
    torch.testing.assert_close(gate.grad, (output - hidden).sum(-1))


def test_parameters_are_layers_times_hidden_without_bias():
    routers = Routers(32, 4096)
    assert sum(p.numel() for p in routers.parameters()) == 131_072
    assert routers.num_layers == 32


def test_start_is_near_one_half():
    torch.manual_seed(0)
    routers = Routers(4, 64)
    assert routers.weight.abs().max() <= 1 / 8
    rho = pool(routers.probabilities(torch.randn(8, 50, 64), 0), torch.ones(8, 50, dtype=torch.bool))
    assert (rho - 0.5).abs().max() < 0.1


def test_squared_norm_by_hand():
    routers = Routers(2, 2)
    with torch.no_grad():
        routers.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -3.0]]))
    norm = routers.squared_norm()
    assert norm.item() == 14.0
    norm.backward()
    assert routers.weight.grad.tolist() == [[2.0, 4.0], [0.0, -6.0]]


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu", torch.bfloat16)])
def test_weights_stay_fp32_and_unchanged(convert):
    routers = Routers(3, 8)
    before = routers.weight.detach().clone()
    routers.squared_norm().backward()
    convert(routers)
    assert routers.weight.dtype == torch.float32
    assert torch.equal(routers.weight, before)
    torch.optim.SGD(routers.parameters(), 0.1).step()


def test_settings_are_validated():
    with pytest.raises(ValueError, match="router.input_norm='layer' is unknown; choose one of none, rms"):
        RouterSettings(input_norm="layer")
    for threshold in (0.0, 1.0, -0.1, 1.5):
        with pytest.raises(ValueError, match="router.threshold"):
            RouterSettings(threshold=threshold)
