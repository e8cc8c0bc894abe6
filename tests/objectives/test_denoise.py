from __future__ import annotations

import pytest
import torch

from megatron_tide.objectives import denoise_loss
from tests.reference import denoise as reference


def test_is_the_weighted_sum_over_the_global_count():
    gold = (-3 * torch.rand(7, dtype=torch.float64)).requires_grad_()
    t = torch.rand(7, dtype=torch.float64).clamp(min=0.05)
    loss, expected = denoise_loss(gold, t, 40.0), reference.denoise(list(gold), t.tolist(), 40)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, gold)[0] for x in (loss, expected)))


def test_two_halves_add_up_to_the_whole():
    gold, t = -torch.rand(9), torch.rand(9).clamp(min=0.1)
    whole = denoise_loss(gold, t, 30.0)
    torch.testing.assert_close(denoise_loss(gold[:4], t[:4], 30.0) + denoise_loss(gold[4:], t[4:], 30.0), whole)


def test_nothing_masked_gives_zero_with_a_graph():
    gold = torch.zeros(0, requires_grad=True)
    loss = denoise_loss(gold, torch.zeros(0), 0.0)
    loss.backward()
    assert loss.item() == 0.0
    assert gold.grad is not None


def test_the_timestep_of_another_type_does_not_change_the_loss_s_type():
    assert denoise_loss(-torch.ones(2), torch.full((2,), 0.5, dtype=torch.float64), 2.0).dtype == torch.float32
    assert denoise_loss(-torch.ones(2), torch.full((2,), 0.5), 2.0).item() == pytest.approx(2.0)
