"""Noise schedules: how likely a token is masked at time t, and what its loss weighs there.

A schedule is a class with two functions of t, and its line in ``choices.NOISE_SCHEDULES``. Nothing else computes with
t: masks are drawn at its ``rate``, the denoising loss and the likelihood divide by its ``inverse_weight``, and TIDAL,
the midrange weight and the logs' bins read the rate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule(ABC):
    """alpha(t), the share of tokens left as they are, falls from 1 to 0 while t goes from 0 to 1.

    Functions take and give float64 tensors of any shape, t in (0, 1]. ``eps``: the smallest time that is drawn; at 0
    nothing is masked and the weight is infinite. Raises ValueError for an eps outside [0, 1).
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps = {self.eps}: the smallest timestep must be in [0, 1)")

    def draw(self, uniform: Tensor) -> Tensor:
        """Timesteps from uniform random numbers in (0, 1): uniform in (eps, 1)."""
        return self.eps + (1 - self.eps) * uniform

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """1 - alpha(t): the probability that a token is masked."""

    @abstractmethod
    def inverse_weight(self, t: Tensor) -> Tensor:
        """(1 - alpha(t)) / -alpha'(t): the bound on -log p is E_t of the masked tokens' -log p over this (MDLM eq. 10).

        The inverse, because losses divide by it: 1 / t of the linear schedule then has no additional rounding.
        """


@dataclass(frozen=True, kw_only=True)
class Linear(NoiseSchedule):
    """alpha(t) = 1 - t, as published: the rate is t, the weight 1 / t."""

    def rate(self, t: Tensor) -> Tensor:
        return t

    def inverse_weight(self, t: Tensor) -> Tensor:
        return t


LINEAR = Linear()
