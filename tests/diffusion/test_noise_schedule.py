"""Noise schedules: the weight belongs to the rate, and another schedule is one class."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_tide.diffusion import MASKINGS, NOISE_SCHEDULES, NoiseSchedule, build_inputs, noise
from tests.diffusion import samples

COUNT = 400


@dataclass(frozen=True, kw_only=True)
class Square(NoiseSchedule):
    """alpha(t) = 1 - t^2: late noise, weight 2 / t."""

    def rate(self, t: Tensor) -> Tensor:
        return t**2

    def inverse_weight(self, t: Tensor) -> Tensor:
        return t / 2


@pytest.mark.parametrize("schedule", [*NOISE_SCHEDULES.values(), Square()], ids=lambda s: type(s).__name__)
def test_the_weight_is_minus_the_slope_of_alpha_over_the_rate(schedule):
    t = torch.linspace(0.01, 0.99, 40, dtype=torch.float64, requires_grad=True)
    rate = schedule.rate(t)
    (slope,) = torch.autograd.grad(rate.sum(), t)  # rate = 1 - alpha, so this is -alpha'(t)
    torch.testing.assert_close(schedule.inverse_weight(t), rate / slope)
    assert torch.equal(rate, rate.sort().values)
    assert float(schedule.rate(torch.ones((), dtype=torch.float64))) == 1.0


def test_masks_follow_the_rate_and_losses_the_weight():
    items = [samples.make(key, (2, 2), [(1, 1)] * 40, ended=False) for key in range(COUNT)]
    batch, t = samples.collate(items), torch.full((COUNT,), 0.6, dtype=torch.float64)
    drawn = noise(batch, seed=1, epoch=0, masking=MASKINGS["synchronous"], schedule=Square(), t=t)
    share = drawn.chunk_masked.double().mean().item()
    assert share == pytest.approx(0.36, abs=4 * (0.36 * 0.64 / (COUNT * 40)) ** 0.5)
    inputs = build_inputs(batch, drawn, student_block=8, student_mask_id=0, teacher=None)
    assert inputs.rate.tolist() == pytest.approx([0.36] * COUNT)
    assert inputs.inverse_weight.tolist() == pytest.approx([0.3] * COUNT)


def test_all_schedules_estimate_the_same_bound():
    """E_t[sum over masked of 1 / inverse_weight] is the number of maskable tokens, whatever the schedule."""
    items = [samples.make(key, (2, 2), [(1, 1)] * 40, ended=False) for key in range(COUNT)]
    batch = samples.collate(items)
    maskable = (batch.student.length - batch.student.prompt).sum().item()
    for schedule in (NOISE_SCHEDULES["linear"], Square()):
        totals = []
        for epoch in range(20):
            drawn = noise(batch, seed=1, epoch=epoch, masking=MASKINGS["synchronous"], schedule=schedule)
            totals.append((drawn.student_masked.sum(1) / drawn.inverse_weight).sum().item() / maskable)
        mean, spread = torch.tensor(totals).mean().item(), torch.tensor(totals).std().item()
        assert mean == pytest.approx(1.0, abs=4 * spread / 20**0.5), schedule
