"""The interface of a teacher for the training step: an object that scores the micro-batches of one optimizer step.

Where its weights are (a copy on every rank, shards, host memory, disk, pipeline stages) is internal to the backend: all
backends return the same numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch

from megatron_tide.diffusion import DistillBatch
from megatron_tide.objectives import TeacherOutputs
from megatron_tide.ranks import World


class Ranks(World, Protocol):
    """What a backend needs to know of the run's ranks."""

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def print_rank0(self, line: str) -> None: ...


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
