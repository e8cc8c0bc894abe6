"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from megatron_tide.choices import LR_SCHEDULES
from megatron_tide.config import TrainConfig


def cosine(done: float) -> float:
    """Half a cosine period: 1 at the start, 0 at the end."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def linear(done: float) -> float:
    return 1.0 - done


def learning_rate(step: int, total: int, peak: float, train: TrainConfig) -> float:
    """Linear warm-up over the first ``warmup_ratio`` of the steps, then ``peak``, and over the last ``lr_decay_share``
    of the steps ``lr_schedule`` down to ``min_lr_ratio * peak``.

    ``step`` counts from 0; step 0 of w warm-up steps has peak / w, so it already moves the weights.
    """
    warmup = int(total * train.warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    start = max(warmup, total - round(total * train.lr_decay_share))
    done = max(0, step - start) / max(1, total - start)
    return peak * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * LR_SCHEDULES[train.lr_schedule](done))
