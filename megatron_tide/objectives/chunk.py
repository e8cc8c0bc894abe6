"""Chunk objectives: one Bernoulli per chunk, for teachers with another tokenizer (TIDE, CALM and Reverse CALM).

A chunk's log-prob is the sum over its target tokens; p = exp(LP / T) is a model's probability of the complete chunk.
Everything is done in log space, in fp32 or wider: a chunk is one event among very many, its p is often far below what
1 - p can resolve.

An objective is a function of two ``Bernoulli``s and one line in ``choices.CHUNK_OBJECTIVES``. Shapes: any, written
[...]; ``_BC`` is [samples, chunks] in the public ``chunk_loss``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tide.choices import CHUNK_OBJECTIVES, named
from megatron_tide.objectives.common import at_least_fp32, sums_at

LOG_FLOOR = math.log(1e-7)
"""Lower bound of the target's log p and log(1-p) (published): one chunk contributes at most 16.1 nats."""


class Bernoulli(NamedTuple):
    """A chunk's log p and log(1-p), tensors [...] of one shape."""

    log_p: Tensor
    log_q: Tensor


@dataclass(frozen=True)
class ChunkObjective:
    """``term(student, target)`` -> loss per chunk [...]. ``reversed``: the student's p weights the target's logs."""

    name: str
    term: Callable[[Bernoulli, Bernoulli], Tensor]
    reversed: bool


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p <= 0, accurate at both ends; its gradient is finite below 0."""
    near_zero = log_p > -math.log(2)
    # Near 0 the other branch would be log1p(-1), with an infinite slope; the gradient of a branch that is not taken is
    # multiplied by 0, and 0 x inf is nan. So that branch gets a harmless input there.
    far = torch.where(near_zero, -1.0, log_p)
    return torch.where(near_zero, torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(far)))


def below_certainty(log_p: Tensor) -> Tensor:
    """log_p, at most -eps of its dtype; the gradient passes unchanged.

    log(1-p) and its slope are infinite at p = 1, and a log-prob that rounds to 0 means "1 within eps". The value stops
    there; the slope stays that of the last representable p instead of 0, so a student that is certain of a chunk
    that the teacher rejects still gets a gradient.
    """
    ceiling = -torch.finfo(log_p.dtype).eps
    return torch.where(log_p > ceiling, log_p + (ceiling - log_p).detach(), log_p)


def student_bernoulli(logp: Tensor, temperature: float) -> Bernoulli:
    """The student's side of chunks with log-probs ``logp`` [...]: not floored, so that no chunk loses its gradient."""
    log_p = below_certainty(at_least_fp32(logp) / temperature)
    return Bernoulli(log_p, log1mexp(log_p))


def teacher_bernoulli(logp: Tensor, temperature: float) -> Bernoulli:
    """The teacher's side, a constant: both logs floored at log 1e-7."""
    with torch.no_grad():
        log_p = (at_least_fp32(logp) / temperature).clamp(max=0)
        return floored(Bernoulli(log_p, log1mexp(log_p)))


def floored(target: Bernoulli) -> Bernoulli:
    """Both logs of a target, at least log 1e-7."""
    return Bernoulli(target.log_p.clamp(min=LOG_FLOOR), target.log_q.clamp(min=LOG_FLOOR))


def calm(student: Bernoulli, target: Bernoulli) -> Tensor:
    """CALM (forward): -[p_t log p_s + (1-p_t) log(1-p_s)]."""
    return -(target.log_p.exp() * student.log_p + target.log_q.exp() * student.log_q)


def reverse_calm(student: Bernoulli, target: Bernoulli) -> Tensor:
    """Reverse CALM: -[p_s log p_t + (1-p_s) log(1-p_t)].

    Linear in p_s with slope -log(p_t/(1-p_t)), which depends only on the frozen teacher: if the teacher's log-prob
    of a chunk is below -T ln 2, the student's p is lowered; a chunk with student p = 0 gets no gradient.
    """
    return -(student.log_p.exp() * target.log_p - torch.expm1(student.log_p) * target.log_q)


def bernoulli_kl(student: Bernoulli, target: Bernoulli) -> Tensor:
    """KL(student || target) of the two Bernoullis: Reverse CALM minus the student's entropy H(p_s). Ours.

    Its minimum is p_s = p_t, where Reverse CALM's is p_s in {0, 1}.
    """
    p_s, q_s = student.log_p.exp(), -torch.expm1(student.log_p)
    return p_s * (student.log_p - target.log_p) + q_s * (student.log_q - target.log_q)


CALM = ChunkObjective("calm", calm, reversed=False)
REVERSE_CALM = ChunkObjective("reverse_calm", reverse_calm, reversed=True)
BERNOULLI_KL = ChunkObjective("bernoulli_kl", bernoulli_kl, reversed=True)


def chunk_loss(
    student_logp: Tensor, teacher_logp: Tensor, active: Tensor, temperature: float = 2.0, kind: str = "reverse_calm"
) -> Tensor:
    """Mean of a chunk objective over the active chunks.

    ``student_logp``, ``teacher_logp`` [B, C]: chunk log-probs (sums over the chunk's target tokens, natural log; not
    yet divided by T). ``active`` bool [B, C]: chunks that are masked and complete on both sides; the others are
    ignored. ``kind``: calm, reverse_calm or bernoulli_kl. Returns a scalar, 0 with a graph where no chunk is active.
    """
    objective: ChunkObjective = named(CHUNK_OBJECTIVES, kind, "chunk objective")
    # An inactive entry may be nan: keep it out of both value and gradient.
    student_BC = torch.where(active, student_logp, -1.0)
    teacher_BC = torch.where(active, teacher_logp, -1.0)
    terms_BC = objective.term(student_bernoulli(student_BC, temperature), teacher_bernoulli(teacher_BC, temperature))
    return (terms_BC * active).sum() / active.sum().clamp(min=1)


def chunk_logp(token_logp_N: Tensor, chunk_N: Tensor, chunks: int) -> Tensor:
    """Token log-probs [N] summed into their chunks -> [chunks]; ``chunk_N`` int64, -1 for a token in no chunk."""
    logp_N = at_least_fp32(token_logp_N)
    # One slot more takes the -1s: selecting them away would wait for the device.
    slot_N = torch.where(chunk_N < 0, chunks, chunk_N)
    return sums_at(slot_N, logp_N, chunks + 1)[:chunks]
