"""TIDAL: strength of the teacher's signal over training progress and timestep (TIDE, TIDAL section).

Early in training the student cannot follow the teacher's tail, and at high t the teacher guesses too. Both axes give
one number per sample, lambda in [0, 1]. It either MIXES the target (the student's own, detached prediction has the
share 1 - lambda) or WEIGHTS the loss. Mixing is the paper's method; with a reversed objective it works against itself
(late in training the student's share of its own target suppresses the self-selection that the objective relies on).
Weighting, ours, changes only the strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tide.choices import TIDAL_AXES, TIDAL_RAMPS, named
from megatron_tide.objectives.chunk import Bernoulli, floored
from megatron_tide.objectives.common import at_least_fp32, mean_over
from megatron_tide.objectives.distribution import forward_kl

MIDRANGE_CENTRE = 0.5
MIDRANGE_WIDTH = 0.15


def cosine_ramp(progress: float) -> float:
    """g(progress): from 0 to 1 over the run."""
    return (1 - math.cos(math.pi * progress)) / 2


def linear_ramp(progress: float) -> float:
    """g(progress) = progress."""
    return progress


def both_axes(ramped: float, peak: float, rate: Tensor) -> Tensor:
    """lambda = lambda_train * (1 - rate)."""
    return ramped * (1 - rate)


def training_axis(ramped: float, peak: float, rate: Tensor) -> Tensor:
    """lambda = lambda_train."""
    return torch.full_like(rate, ramped)


def timestep_axis(ramped: float, peak: float, rate: Tensor) -> Tensor:
    """lambda = peak * (1 - rate)."""
    return peak * (1 - rate)


def tidal_strength(
    progress: float, t: Tensor, init: float = 0.1, peak: float = 0.9, ramp: str = "cosine", axes: str = "both"
) -> Tensor:
    """lambda, of the shape of ``t``: lambda_train(p) * (1 - t) with lambda_train(p) = init + (peak - init) * g(p).

    ``progress``: step / total, in [0, 1]. ``t``: timesteps in (0, 1]. ``ramp``: cosine, (1 - cos(pi p)) / 2, or
    linear. ``axes``: both | training (no 1 - t) | timestep (peak * (1 - t)). ValueError for another name or a
    progress outside [0, 1].
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress {progress} is outside [0, 1]; pass step / total steps")
    ramped = init + (peak - init) * named(TIDAL_RAMPS, ramp, "TIDAL ramp")(progress)
    return named(TIDAL_AXES, axes, "TIDAL axes")(ramped, peak, torch.as_tensor(t))


def midrange_weight(t: Tensor) -> Tensor:
    """exp(-(t - 0.5)^2 / (2 * 0.15^2)), of the shape of ``t``: prefers samples with about half their tokens masked."""
    return torch.exp(-((t - MIDRANGE_CENTRE) ** 2) / (2 * MIDRANGE_WIDTH**2))


def mixed_rows(student_mD: Tensor, teacher_mD: Tensor, strength_m: Tensor) -> Tensor:
    """log r [m, D], r = softmax((1 - lambda) z_s + lambda z_t), DETACHED; logits [m, D], already divided by T.

    The logits may each be shifted by a constant per row, log-probs for instance: the softmax takes it out. With a
    bucket this mixes the log-probs of the compared categories, the bucket's too, and renormalises.
    """
    with torch.no_grad():
        share_m1 = strength_m.to(student_mD.dtype).unsqueeze(-1)
        return torch.log_softmax((1 - share_m1) * student_mD + share_m1 * teacher_mD, dim=-1)


def mixed_chunks(student: Bernoulli, teacher: Bernoulli, strength: Tensor) -> Bernoulli:
    """p_mix = (1 - lambda) p_s + lambda p_t and its complement, DETACHED, in log space; all shapes [...] equal.

    It replaces the teacher, so the teacher's floor applies to it: a chunk's gradient stays bounded.
    """
    with torch.no_grad():
        share = strength.to(student.log_p.dtype)
        own_share, teacher_share = torch.log1p(-share), share.log()
        log_p = torch.logaddexp(own_share + student.log_p, teacher_share + teacher.log_p)
        log_q = torch.logaddexp(own_share + student.log_q, teacher_share + teacher.log_q)
        return floored(Bernoulli(log_p, log_q))


def teacher_rows(student_mD: Tensor, teacher_mD: Tensor, strength_m: Tensor) -> Tensor:
    """Only the teacher: its log-probs [m, D] over the categories, detached."""
    with torch.no_grad():
        return torch.log_softmax(teacher_mD, dim=-1)


def teacher_chunks(student: Bernoulli, teacher: Bernoulli, strength: Tensor) -> Bernoulli:
    """Only the teacher."""
    return teacher


@dataclass(frozen=True)
class TidalUse:
    """What lambda does to one objective: the target of rows and of chunks, and the weight of the loss."""

    name: str
    rows: Callable[[Tensor, Tensor, Tensor], Tensor]
    chunks: Callable[[Bernoulli, Bernoulli, Tensor], Bernoulli]
    weight: Callable[[Tensor], Tensor]
    mixes: bool


OFF = TidalUse("off", teacher_rows, teacher_chunks, torch.ones_like, mixes=False)
MIX = TidalUse("mix", mixed_rows, mixed_chunks, torch.ones_like, mixes=True)
WEIGHT = TidalUse("weight", teacher_rows, teacher_chunks, torch.clone, mixes=False)


def tidal_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    strength: Tensor,
    temperature: float = 2.0,
    weight: Tensor | None = None,
) -> Tensor:
    """TIDAL over a shared vocabulary: mean over rows of T^2 KL(r || softmax(z_s / T)).

    The target r = softmax(((1 - lambda) z_s + lambda z_t) / T) is detached. ``student_logits``, ``teacher_logits``
    [M, V]; ``strength`` [M], lambda; ``weight`` [M] or None multiplies a row's loss (the mean is still over M).
    Returns a scalar, 0 with a graph for M = 0.
    """
    student_MV = at_least_fp32(student_logits) / temperature
    teacher_MV = at_least_fp32(teacher_logits) / temperature
    rows_M = forward_kl(torch.log_softmax(student_MV, dim=-1), mixed_rows(student_MV, teacher_MV, strength))
    weighted_M = rows_M if weight is None else rows_M * weight
    return temperature**2 * mean_over(weighted_M.sum(), rows_M.shape[0])
