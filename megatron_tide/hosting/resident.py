"""The teacher as a whole copy on every rank: what fits, and what every other hosting is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_tide.diffusion import Noised
from megatron_tide.models import gold_logp, masked_rows
from megatron_tide.objectives import Strategy, TeacherAnswer


class ResidentTeacher:
    """A frozen model that answers a window of noised micro-batches with the numbers that the objective needs.

    The number of forwards is the number of micro-batches, whatever the data.
    """

    def __init__(self, model: Any, strategy: Strategy) -> None:
        self.model = model.eval().requires_grad_(False)
        self.strategy = strategy

    @torch.no_grad()
    def score(self, window: Sequence[Noised]) -> list[TeacherAnswer]:
        """One answer a micro-batch: gold log-probs [R] and / or hidden rows [P, H_teacher]: numbers, not logits."""
        return [self._score(noised) for noised in window]

    def read(self) -> dict[str, float]:
        return {}

    def _score(self, noised: Noised) -> TeacherAnswer:
        assert noised.teacher is not None
        head = self.model.head_weight
        rows_RH = masked_rows(self.model, noised.teacher)
        gold_R = gold_logp(rows_RH, head, noised.teacher_gold) if self.strategy.needs_gold else None
        if not self.strategy.needs_hidden:
            return TeacherAnswer(gold_logp=gold_R)
        return TeacherAnswer(gold_logp=gold_R, hidden=rows_RH[noised.pair_teacher_row], head_weight=head)


class NoTeacher:
    """The denoising-only baseline: an empty answer a micro-batch."""

    def score(self, window: Sequence[Noised]) -> list[TeacherAnswer]:
        return [TeacherAnswer() for _ in window]

    def read(self) -> dict[str, float]:
        return {}
