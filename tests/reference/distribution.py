"""Divergences of one row's distributions, category by category, in plain probabilities."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def probabilities(logits_V: torch.Tensor, temperature: float) -> list[torch.Tensor]:
    weights = [torch.exp(logits_V[v] / temperature) for v in range(logits_V.shape[0])]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    return [weight / total for weight in weights]


def categories(logits_V: torch.Tensor, temperature: float, ids: Sequence[int], bucket: bool) -> list[torch.Tensor]:
    """The probabilities of ``ids``; with a bucket also 1 minus their sum, without one renormalised among themselves."""
    everything = probabilities(logits_V, temperature)
    mapped = [everything[v] for v in ids]
    total = mapped[0]
    for p in mapped[1:]:
        total = total + p
    if bucket:
        return [*mapped, 1 - total]
    return [p / total for p in mapped]


def kl(p: Sequence[torch.Tensor], q: Sequence[torch.Tensor]) -> torch.Tensor:
    """KL(p || q)."""
    total = torch.zeros((), dtype=torch.float64)
    for p_d, q_d in zip(p, q):
        total = total + p_d * (torch.log(p_d) - torch.log(q_d))
    return total


DIVERGENCES = {
    "forward_kl": lambda student, target: kl(target, student),
    "reverse_kl": lambda student, target: kl(student, target),
}


def reached(prefix_ids: Sequence[int]) -> list[int]:
    """The student ids that some teacher id begins with, ascending."""
    return sorted({s for s in prefix_ids if s >= 0})


def prefix_categories(
    student_V: torch.Tensor, teacher_V: torch.Tensor, temperature: float, prefix_ids: Sequence[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Both sides' probabilities of what comes next: each reached student id, then everything else.

    A teacher token's whole probability goes to its student id in ``prefix_ids`` (-1: to everything else).
    """
    student, teacher = probabilities(student_V, temperature), probabilities(teacher_V, temperature)
    ids, nothing = reached(prefix_ids), torch.zeros((), dtype=torch.float64)
    ours = [student[s] for s in ids] + [sum((p for s, p in enumerate(student) if s not in ids), start=nothing)]
    theirs = []
    for s in [*ids, -1]:
        mass = nothing
        for v, p in enumerate(teacher):
            if (prefix_ids[v] if v < len(prefix_ids) else -1) == s:
                mass = mass + p
        theirs.append(mass)
    return ours, theirs
