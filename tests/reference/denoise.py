"""The denoising loss, written as the sum it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def denoise(target_logprobs: Sequence[Any], t: Sequence[float], maskable: int) -> Any:
    """sum_i (1 / t_i) * (-log p_i) / maskable."""
    total: Any = 0.0
    for logp, rate in zip(target_logprobs, t):
        total = total + (1.0 / rate) * -logp
    return total / maskable
