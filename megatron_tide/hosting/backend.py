"""The interface of a teacher for the training step: an object that scores the micro-batches of one optimizer step.

Where its weights are (a copy on every rank, shards, host memory, disk, pipeline stages) is internal to the backend: all
backends return the same numbers.

Shapes: R target positions of a micro-batch, P one-to-one chunks ("pairs"), H the teacher's hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megatron_tide.diffusion import DistillBatch
from megatron_tide.models import masked_hidden_states, target_logprobs
from megatron_tide.objectives import Strategy, TeacherOutputs


class Ranks(Protocol):
    """What a backend needs to know of the run's ranks."""

    @property
    def size(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def print_rank0(self, line: str) -> None: ...

    def broadcast_object(self, value: Any) -> Any: ...


class TeacherBackend(ABC):
    """A frozen teacher. The number of collectives per call never depends on data.

    The class behind a ``--teacher-hosting`` has ``open(folder, settings, dtype, strategy, ranks)``, which loads the
    teacher of a folder on all ranks; ``settings``: the DeepSpeed JSON of the hosting, {} where it has none.
    """

    @abstractmethod
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        """The outputs the strategy needs, one per micro-batch; a collective call of all ranks."""

    def metrics(self) -> dict[str, float]:
        """Values to log, measured since the previous call."""
        return {}


class NoTeacher(TeacherBackend):
    """The denoising-only baseline: empty outputs."""

    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        return [TeacherOutputs() for _ in microbatches]


class ReplicatedTeacher(TeacherBackend):
    """A full copy on each rank, one forward per micro-batch: the reference for the tests of every other backend."""

    def __init__(self, model: Any, strategy: Strategy) -> None:
        self.model = model.eval().requires_grad_(False)
        self.strategy = strategy

    @classmethod
    def open(
        cls, folder: str, settings: dict[str, Any], dtype: torch.dtype, strategy: Strategy, ranks: Ranks
    ) -> ReplicatedTeacher:
        from megatron_tide.models import load_model

        return cls(load_model(folder, dtype, device=str(ranks.device)), strategy)

    @torch.no_grad()
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        return [self._score(batch) for batch in microbatches]

    def _score(self, batch: DistillBatch) -> TeacherOutputs:
        assert batch.teacher is not None
        head = self.model.head_weight
        hidden_RH = masked_hidden_states(self.model, batch.teacher)
        needed = self.strategy.needs_target_logprobs
        targets_R = target_logprobs(hidden_RH, head, batch.teacher_targets) if needed else None
        if not self.strategy.needs_hidden:
            return TeacherOutputs(target_logprobs=targets_R)
        return TeacherOutputs(target_logprobs=targets_R, hidden=hidden_RH[batch.pair_teacher_index], head_weight=head)
