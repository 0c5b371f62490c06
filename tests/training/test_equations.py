"""Objectives against hand-computed values."""

import pytest
import torch

from firstlab.training.equations import distillation_losses, dual_step, lora_loss, router_loss, selection_score


def test_router_loss_adds_regulariser_and_penalty():
    loss = router_loss(torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0), lam=0.01, alpha=0.1)
    assert loss.item() == pytest.approx(2.0 + 0.03 + 0.5)


def test_lora_loss_has_no_regulariser():
    assert lora_loss(torch.tensor(2.0), torch.tensor(6.0), beta=0.05).item() == pytest.approx(2.3)


def test_distillation_losses_are_divergences_from_the_teacher():
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.0, 1.0], [1.0, 3.0]])
    p, q = teacher.softmax(-1), student.softmax(-1)
    by_hand = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(distillation_losses(student, teacher), by_hand)
    assert distillation_losses(teacher, teacher).tolist() == [0, 0]


def test_too_little_skipping_raises_the_multiplier_and_too_much_lowers_it():
    assert dual_step(0.2, skip_rate=0.10, target=0.15, rate=2.0) == pytest.approx(0.3)
    assert dual_step(0.2, skip_rate=0.50, target=0.15, rate=2.0) == pytest.approx(-0.5)
    assert dual_step(0.2, skip_rate=0.15, target=0.15, rate=2.0) == pytest.approx(0.2)


def test_selection_score_punishes_only_the_distance_beyond_the_tolerance():
    assert selection_score(1.5, 0.9, target=None, tolerance=0.01, weight=100) == 1.5
    assert selection_score(1.5, 0.155, target=0.15, tolerance=0.01, weight=100) == 1.5
    assert selection_score(1.5, 0.18, target=0.15, tolerance=0.01, weight=100) == pytest.approx(1.5 + 2.0)
    assert selection_score(1.5, 0.12, target=0.15, tolerance=0.01, weight=100) == pytest.approx(1.5 + 2.0)
