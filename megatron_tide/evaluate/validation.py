"""The measurement that a training run takes every few steps, shared out over its ranks."""

from __future__ import annotations

import math
from typing import Any

from megatron_tide.data import PreparedData
from megatron_tide.evaluate.likelihood import measure, spread
from megatron_tide.evaluate.sides import Side

DRAWS = 4


def validate(
    model: Any,
    data: PreparedData,
    side: Side,
    *,
    world: Any,
    samples: int,
    batch_size: int,
    seed: int = 0,
    slice_rows: int | None = None,
) -> dict[str, float]:
    """Held-out bits per byte and masked-token accuracy, the same on every rank; one collective on host numbers.

    Each rank scores every ``world.size``-th of the ``samples`` (``world``: ``rank``, ``size``, ``sum_over_ranks``).
    The numbers equal those of ``evaluate_likelihood`` with ``draws=DRAWS`` on the same samples.
    """
    indices = spread(len(data), samples)[world.rank :: world.size]
    sums = measure(
        model, data, side, indices, draws=DRAWS, seed=seed, batch_size=batch_size, slice_rows=slice_rows, progress=None
    )
    nats, size, right, masked = world.sum_over_ranks(
        [sums.bound().sum(), sums.bytes.sum(), sums.right.sum(), sums.masked.sum()]
    )
    return {
        "validation/bits_per_byte": nats / size / math.log(2.0),
        "validation/masked_token_accuracy": right / masked if masked else math.nan,
    }
