"""The learning rate by step: the published cosine bit for bit, and decay over the last share of the run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megatron_tide.config import TrainConfig
from megatron_tide.train.schedule import learning_rate


def test_the_default_is_the_published_cosine_bit_for_bit():
    train, total, warmup = TrainConfig(min_lr_ratio=0.07), 137, 13
    for step in range(total):
        cosine = math.cos(math.pi * ((step - warmup) / (total - warmup)))
        expected = 3e-4 * (step + 1) / warmup if step < warmup else 3e-4 * (0.07 + (1.0 - 0.07) * 0.5 * (1.0 + cosine))
        assert learning_rate(step, total, 3e-4, train) == expected


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_decay_over_the_last_share(shape):
    train = TrainConfig(lr_schedule=shape, lr_decay_share=0.3, min_lr_ratio=0.1)
    rates = [learning_rate(step, 100, 2.0, train) for step in range(100)]
    assert rates[9:71] == [2.0] * 62
    assert all(left > right for left, right in pairwise(rates[70:]))
    assert rates[85] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # the middle of either shape
    assert 0.2 < rates[99] < 0.3


def test_shares_at_the_edges():
    assert learning_rate(99, 100, 1.0, TrainConfig(lr_decay_share=0.0)) == 1.0
    assert learning_rate(55, 100, 1.0, TrainConfig(lr_schedule="linear")) == pytest.approx(0.5)
    # The warm-up comes first: it leaves the decay fewer steps than its share.
    assert learning_rate(49, 100, 1.0, TrainConfig(warmup_ratio=0.5, lr_decay_share=0.9)) == 1.0
