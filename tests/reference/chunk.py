"""The chunk objectives for one chunk, as the equations stand: plain probabilities and 1 - p, no log-space care.

Arguments are fp64 scalar tensors, so that autograd gives reference gradients.
"""

from __future__ import annotations

import torch

FLOOR = 1e-7


def probability(logp: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.exp(logp / temperature)


def teacher_target(logp: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(p_t, 1 - p_t), each at least 1e-7."""
    p = probability(logp, temperature)
    return p.clamp(min=FLOOR), (1 - p).clamp(min=FLOOR)


def mixed_target(
    student_logp: torch.Tensor, teacher_logp: torch.Tensor, temperature: float, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """p_mix = (1 - lambda) p_s + lambda p_t and 1 - p_mix, detached, each at least 1e-7."""
    p = (1 - strength) * probability(student_logp, temperature) + strength * probability(teacher_logp, temperature)
    return p.detach().clamp(min=FLOOR), (1 - p.detach()).clamp(min=FLOOR)


def calm(p_s: torch.Tensor, p_t: torch.Tensor, q_t: torch.Tensor) -> torch.Tensor:
    return -(p_t * torch.log(p_s) + q_t * torch.log(1 - p_s))


def reverse_calm(p_s: torch.Tensor, p_t: torch.Tensor, q_t: torch.Tensor) -> torch.Tensor:
    return -(p_s * torch.log(p_t) + (1 - p_s) * torch.log(q_t))


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * torch.log(p) + (1 - p) * torch.log(1 - p))


def bernoulli_kl(p_s: torch.Tensor, p_t: torch.Tensor, q_t: torch.Tensor) -> torch.Tensor:
    return p_s * torch.log(p_s / p_t) + (1 - p_s) * torch.log((1 - p_s) / q_t)


TERMS = {"calm": calm, "reverse_calm": reverse_calm, "bernoulli_kl": bernoulli_kl}


def chunk_loss(
    student_BC: torch.Tensor, teacher_BC: torch.Tensor, active_BC: torch.Tensor, temperature: float, kind: str
) -> torch.Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for b in range(student_BC.shape[0]):
        for c in range(student_BC.shape[1]):
            if active_BC[b, c]:
                p_t, q_t = teacher_target(teacher_BC[b, c], temperature)
                total = total + TERMS[kind](probability(student_BC[b, c], temperature), p_t, q_t)
                count += 1
    return total / max(count, 1)
