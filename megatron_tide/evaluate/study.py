"""Differences between models over training seeds AND test samples: intervals, p-values, Holm's correction, verdicts.

Shapes: S seeds, N samples, R resamples. All seeds of all models are scored on the same samples with the same masks, so
seeds and samples are crossed: a resample draws seeds and, for all of these alike, samples. (Samples drawn anew within
each seed would average away what a sample does to all seeds, and intervals would be too short.)

Five seeds are few, which percentiles of a bootstrap ignore: of 95 % they keep about 80 % where seeds matter most. Hence
(1) a resample draws S - 1 of S seeds, which makes the variance of the resampled seeds' mean that of the mean of S seeds
(Rao and Wu 1988), and (2) interval and p-value take Student's t in place of the normal distribution, with the degrees
of freedom of the two variances together (Satterthwaite 1946): S - 1 where only seeds matter, N - 1 where only samples
do. The interval is wide rather than short where seeds and samples interact (Owen 2007).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tide.evaluate.bootstrap import LEVEL, Estimate, Floats

RESAMPLES = 4000
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"
_ANGLES = np.linspace(0.0, math.pi / 2.0, 100_001)


@dataclass(frozen=True)
class Hypothesis:
    """``lower`` has fewer held-out bits per byte than ``higher``: two names of models."""

    name: str
    lower: str
    higher: str
    meaning: str

    @classmethod
    def parse(cls, text: str) -> Hypothesis:
        """``NAME LOWER < HIGHER: meaning``. Raises ValueError for another form."""
        found = re.fullmatch(r"(\S+)\s+(\S+)\s+<\s+([^\s:]+)\s*:\s*(.+)", text.strip())
        if not found:
            raise ValueError(f"hypothesis {text!r}: write it as 'NAME LOWER < HIGHER: meaning'")
        return cls(*found.groups())


@dataclass(frozen=True)
class Effect:
    """A difference in bits per byte: over all seeds with its interval, the two-sided p of "none", and of each seed."""

    difference: Estimate
    p: float
    freedom: float
    by_seed: list[float]

    def to_dict(self) -> dict[str, Any]:
        return {"difference": self.difference.to_dict(), "p": self.p, "freedom": self.freedom, "by_seed": self.by_seed}


def effect(nats_SN: Floats, bytes_N: Floats, seed: int = 0) -> Effect:
    """Bits per byte of ``nats_SN``: differences of two models' nats, by training seed and sample.

    Raises:
        ValueError: fewer than two seeds or samples: nothing to tell their variance from.
    """
    seeds, samples = nats_SN.shape
    if seeds < 2 or samples < 2:
        raise ValueError(f"{seeds} seeds and {samples} samples: an interval over both needs two or more of each")
    bits_SN, size = nats_SN / math.log(2.0), float(bytes_N.sum())
    by_seed_S = bits_SN.sum(1) / size
    value = float(by_seed_S.mean())
    residual_N = (bits_SN.mean(0) - value * bytes_N) * samples / size  # the ratio's, to first order
    parts = by_seed_S.var(ddof=1) / seeds, residual_N.var(ddof=1) / samples
    if not sum(parts):
        return Effect(Estimate(value, value, value), float(value == 0.0), math.inf, by_seed_S.tolist())
    freedom = float(sum(parts) ** 2 / (parts[0] ** 2 / (seeds - 1) + parts[1] ** 2 / (samples - 1)))
    error = float(_resampled(bits_SN, bytes_N, seed).std(ddof=1))
    half = error * t_quantile(LEVEL, freedom)
    p = t_outside(value / error, freedom)
    return Effect(Estimate(value, value - half, value + half), p, freedom, by_seed_S.tolist())


def _resampled(bits_SN: Floats, bytes_N: Floats, seed: int) -> Floats:
    """[R]: bits per byte of ``RESAMPLES`` crossed resamples; they depend on (S, N, seed) only."""
    generator = np.random.default_rng(seed)
    seeds, samples = bits_SN.shape
    seeds_RS = generator.multinomial(seeds - 1, np.full(seeds, 1.0 / seeds), size=RESAMPLES) / (seeds - 1)
    samples_RN = generator.multinomial(samples, np.full(samples, 1.0 / samples), size=RESAMPLES)
    return ((seeds_RS @ bits_SN) * samples_RN).sum(1) / (samples_RN @ bytes_N)


def _t_inside(freedom: float) -> Floats:
    """Of Student's t: the probability of |t| below sqrt(freedom) tan(angle), at each of ``_ANGLES``."""
    density = np.cos(_ANGLES) ** (freedom - 1.0)
    area = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2.0)))
    return area / area[-1]


def t_outside(t: float, freedom: float) -> float:
    """Two-sided p of Student's t."""
    inside = np.interp(math.atan(abs(t) / math.sqrt(freedom)), _ANGLES, _t_inside(freedom))
    return float(max(0.0, 1.0 - inside))


def t_quantile(level: float, freedom: float) -> float:
    """The t that |t| is below with probability ``level``."""
    return math.tan(float(np.interp(level, _t_inside(freedom), _ANGLES))) * math.sqrt(freedom)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for as many hypotheses as there are (Holm 1979), in the order given."""
    corrected, least = [0.0] * len(ps), 0.0
    for place, index in enumerate(np.argsort(ps, kind="stable")):
        least = max(least, min(1.0, (len(ps) - place) * ps[index]))
        corrected[index] = least
    return corrected


def verdict(difference: float, corrected_p: float) -> str:
    """Of "the difference is below zero", by a two-sided test: a difference that is surely above zero refutes it."""
    if corrected_p >= 1.0 - LEVEL:
        return OPEN
    return HOLDS if difference < 0.0 else FAILS
