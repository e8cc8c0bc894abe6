"""TIDAL's strength, weights and mixed row target, as written in the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tests.reference.distribution import kl, probabilities


def strength(progress: float, t: float, init: float, peak: float, ramp: str, axes: str) -> float:
    ramped = (1 - math.cos(math.pi * progress)) / 2 if ramp == "cosine" else progress
    trained = init + (peak - init) * ramped
    if axes == "training":
        return trained
    if axes == "timestep":
        return peak * (1 - t)
    return trained * (1 - t)


def midrange(t: float) -> float:
    return math.exp(-((t - 0.5) ** 2) / (2 * 0.15**2))


def mixed(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], share: float) -> list[torch.Tensor]:
    """The geometric mean of two distributions, renormalised and detached: the softmax of mixed logits."""
    weights = [(p_s.detach() ** (1 - share)) * (p_t.detach() ** share) for p_s, p_t in zip(student, teacher)]
    total = sum(weights)
    return [weight / total for weight in weights]


def tidal_kl(
    student_MV: torch.Tensor,
    teacher_MV: torch.Tensor,
    strength_M: Sequence[float],
    temperature: float,
    weight_M: Sequence[float],
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for m in range(student_MV.shape[0]):
        logits = (1 - strength_M[m]) * student_MV[m] + strength_M[m] * teacher_MV[m]
        target = [p.detach() for p in probabilities(logits, temperature)]
        total = total + weight_M[m] * temperature**2 * kl(target, probabilities(student_MV[m], temperature))
    return total / student_MV.shape[0]
