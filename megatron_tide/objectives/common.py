"""Shared by all objectives: lookup by name, precision, means over a global count, metrics by bins."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """``x`` in fp32, or in fp64 if it is already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over(total: Tensor, count: float) -> Tensor:
    """``total`` / ``count``; an empty batch (0 / 0) gives 0 and keeps its graph, so that every rank runs backward."""
    return total / max(count, 1.0)


def sums_at(place_N: Tensor, value_N: Tensor, size: int) -> Tensor:
    """The sum of the ``value_N`` at each place below ``size``, [size]; places int64. The same bits on every run."""
    zeros = value_N.new_zeros(size)
    if value_N.device.type == "cpu":
        return zeros.index_add(0, place_N, value_N)
    # On CUDA index_add adds with atomics, in any order; this sorts the places first, and does not wait for the device.
    return zeros.index_put((place_N,), value_N, accumulate=True)


BINS = 10  # of [0, 1], equally wide; the last one holds 1 too
Metrics = dict[str, tuple[Tensor, Tensor]]
"""Name -> (sum, count) on the device, both scalars, or [BINS] for ``name/0.0`` .. ``name/0.9``; the mean is for whoever
prints it."""


def means_by_bin(name: str, place_N: Tensor, value_N: Tensor) -> Metrics:
    """The mean of ``value_N`` in each bin of ``place_N``, numbers in [0, 1]: ``name/0.0`` .. ``name/0.9``."""
    return {name: _binned(place_N, value_N)}


def shares_by_bin(name: str, place_N: Tensor) -> Metrics:
    """The share of ``place_N``, numbers in [0, 1], in each bin: ``name/0.0`` .. ``name/0.9``."""
    _, counts = _binned(place_N, place_N)
    return {name: (counts, counts.sum().expand(BINS))}


def bin_names(name: str) -> list[str]:
    return [f"{name}/{i / BINS:.1f}" for i in range(BINS)]


def _binned(place_N: Tensor, value_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count by bin, float64 [BINS]; nothing waits for the device."""
    bins_N = (place_N * BINS).long().clamp_(0, BINS - 1)
    ones_N = torch.ones_like(value_N, dtype=torch.float64)
    return sums_at(bins_N, value_N.double(), BINS), sums_at(bins_N, ones_N, BINS)
