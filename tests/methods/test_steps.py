"""SkipDecode's schedule and calibration, early exit's threshold search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firstlab.methods.early_exit import calibrate_threshold, teacher_forced_skip_rates
from firstlab.methods.skip_decode import budget, calibrate_skip_decode, schedule_skip_rate, skip_decode_schedule
from firstlab.model.routes import EarlyExit
from support.models import pair, prompts


def test_a_schedule_written_by_hand():
    assert [budget(t, 4, 3, 6) for t in range(6)] == [6, 5, 5, 4, 3, 3]
    routes = skip_decode_schedule(6, 3, 6, 4)
    assert routes.schedule.int().tolist() == [
        [1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 1, 1],
        [1, 0, 1, 1, 1, 1],
        [1, 0, 0, 1, 1, 1],
        [1, 0, 0, 0, 1, 1],
    ]
    # Responses of 3 and 6 tokens take 2 and 5 steps: 6, 5 and 6, 5, 5, 4, 3 of 6 layers.
    expected = 1 - (11 / 2 + 23 / 5) / 2 / 6
    assert schedule_skip_rate(routes, [3, 6, 1]) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 24), st.data())
def test_every_step_runs_its_budget_with_the_warmup_layers(layers, data):
    warmup = data.draw(st.integers(0, layers - 1))
    least = data.draw(st.integers(max(warmup, 1), layers))
    most = data.draw(st.integers(least, layers))
    horizon = data.draw(st.integers(1, 12))
    schedule = skip_decode_schedule(layers, least, most, horizon, warmup).schedule
    assert schedule.sum(1).tolist() == [budget(t, horizon, least, most) for t in range(horizon + 1)]
    assert schedule[:, :warmup].all()
    assert schedule[0].sum() == most and schedule[-1].sum() == least


@pytest.mark.parametrize("target", [0.15, 0.25, 0.35])
def test_calibration_meets_the_rate_on_the_lengths_it_is_given(target):
    lengths = [9, 12, 13, 15, 20, 31]
    least, most, rate = calibrate_skip_decode(16, target, lengths, 40)
    assert abs(rate - target) <= 0.02 and least < most
    assert schedule_skip_rate(skip_decode_schedule(16, least, most, 40), lengths) == rate
    # Nothing within the tolerance is steeper.
    for low in range(1, 17):
        for high in range(low + most - least + 1, 17):
            other = schedule_skip_rate(skip_decode_schedule(16, low, high, 40), lengths)
            assert abs(other - target) > 0.005


def test_budgets_out_of_order_are_refused():
    for least, most in ((0, 4), (5, 4), (3, 7)):
        with pytest.raises(ValueError, match=r"method.min_exit_layer=\d and method.max_exit_layer=\d must satisfy"):
            skip_decode_schedule(6, least, most, 10)
    with pytest.raises(ValueError, match="no response has a second token"):
        schedule_skip_rate(skip_decode_schedule(6, 3, 6, 4), [1, 1])


def test_threshold_search():
    assert calibrate_threshold(lambda x: 1 - x, 0.15) == pytest.approx(0.85, abs=1e-4)
    assert calibrate_threshold(lambda x: 0.9 if x < 0.3 else 0.1, 0.15) >= 0.3
    with pytest.raises(ValueError, match=r"target_skip=0.6 cannot be reached: threshold 0 skips 0.500"):
        calibrate_threshold(lambda x: 0.5 * (1 - x), 0.6)
    with pytest.raises(ValueError, match="no response has a second token"):
        calibrate_threshold(lambda x: float("nan"), 0.15)


def test_the_teacher_forced_rate_is_that_of_cached_decoding():
    _, model = pair("llama")
    ids, mask = prompts()

    def generated(threshold):
        rule = EarlyExit(threshold, "cosine")
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
        return rule, model.generate(ids, mask, routes=rule, **options)

    rule, out = generated(0.75)
    full = torch.cat([mask, mask.new_ones(3, 6)], dim=1)
    labels = out.sequences.masked_fill(torch.arange(18) < 12, -100)
    asked = (torch.arange(18) < 12).expand_as(full)
    batch = {"input_ids": out.sequences, "attention_mask": full, "labels": labels, "prompt_mask": asked}
    rates = teacher_forced_skip_rates(model, batch, rule)
    assert 0 < rates.mean() < 0.8
    torch.testing.assert_close(rates, out.past_key_values.skip_rate)
    labels[0, 13:] = -100
    assert teacher_forced_skip_rates(model, batch, rule)[0].isnan()
