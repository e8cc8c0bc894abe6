"""The teacher as a whole copy on every rank: what fits, and what every other hosting is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_tide.diffusion import DistillBatch
from megatron_tide.models import masked_hidden_states, target_logprobs
from megatron_tide.objectives import Strategy, TeacherOutputs


class ReplicatedTeacher:
    """A frozen model that answers a window of noised micro-batches with the numbers that the objective needs.

    The number of forwards is the number of micro-batches, whatever the data.
    """

    def __init__(self, model: Any, strategy: Strategy) -> None:
        self.model = model.eval().requires_grad_(False)
        self.strategy = strategy

    @torch.no_grad()
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        """One answer a micro-batch: gold log-probs [R] and / or hidden rows [P, H_teacher]: numbers, not logits."""
        return [self._score(batch) for batch in microbatches]

    def metrics(self) -> dict[str, float]:
        return {}

    def _score(self, batch: DistillBatch) -> TeacherOutputs:
        assert batch.teacher is not None
        head = self.model.head_weight
        rows_RH = masked_hidden_states(self.model, batch.teacher)
        targets_R = (
            target_logprobs(rows_RH, head, batch.teacher_targets) if self.strategy.needs_target_logprobs else None
        )
        if not self.strategy.needs_hidden:
            return TeacherOutputs(target_logprobs=targets_R)
        return TeacherOutputs(target_logprobs=targets_R, hidden=rows_RH[batch.pair_teacher_index], head_weight=head)


class NoTeacher:
    """The denoising-only baseline: an empty answer a micro-batch."""

    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        return [TeacherOutputs() for _ in microbatches]

    def metrics(self) -> dict[str, float]:
        return {}
