"""Confidence intervals of ratios by resampling samples: how much a number would vary with another sample of the same
data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
_AT_ONCE = 64  # resamples drawn together: bounds the memory at 64 x samples numbers

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number and the interval that holds it with probability ``LEVEL``."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, spec: str) -> str:
        """``value [low, high]`` with four decimals; ``spec`` "+" shows signs."""
        value, low, high = (format(number, f"{spec}.4f") for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def ratio(numerator_n: Floats, denominator_n: Floats, seed: int) -> Estimate:
    """sum(numerator) / sum(denominator) with its percentile bootstrap interval over the n samples.

    The resamples depend on (n, seed) only, so two models on the same data are resampled alike.
    """
    assert numerator_n.ndim == 1
    assert numerator_n.shape == denominator_n.shape
    top, bottom = float(numerator_n.sum()), float(denominator_n.sum())
    if bottom == 0.0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    drawn = _resampled_ratios(numerator_n, denominator_n, seed)
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.nanquantile(drawn, [tail, 1.0 - tail])
    return Estimate(top / bottom, float(low), float(high))


def _resampled_ratios(numerator_n: Floats, denominator_n: Floats, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    count = len(numerator_n)
    ratios = []
    for first in range(0, RESAMPLES, _AT_ONCE):
        size = min(_AT_ONCE, RESAMPLES - first)
        times = generator.multinomial(count, np.full(count, 1.0 / count), size=size).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without a denominator says nothing: NaN
            ratios.append((times @ numerator_n) / (times @ denominator_n))
    return np.concatenate(ratios)


def mean(values: Sequence[float], seed: int) -> Estimate:
    """Mean of per-sample values with its bootstrap interval over the samples."""
    array = np.asarray(values, dtype=np.float64)
    return ratio(array, np.ones_like(array), seed)
