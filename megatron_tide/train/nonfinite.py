"""Steps whose loss or gradient is not finite: skipped on all ranks, reported, and limited in number.

DeepSpeed skips a step when the gradient norm is not finite. The norm is global, so one bad sample skips the step on all
ranks, and weights and moments stay unchanged. This file reports which samples caused it.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_tide.files import appending
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.metrics import MetricAccumulator
from megatron_tide.train.microbatches import MicrobatchLoader
from megatron_tide.training_checkpoint import TrainState

PATIENCE = 10  # number of consecutive steps that can be skipped
SKIPPED = "skipped.jsonl"


class NonFiniteGuard:
    """Counts consecutive skipped steps; ``before`` is the state before the first of them."""

    def __init__(self, folder: Path, loader: MicrobatchLoader, world: DistContext) -> None:
        self._folder, self._loader, self._world = folder, loader, world
        self._skipped: list[int] = []
        self.before: TrainState | None = None

    @property
    def exhausted(self) -> bool:
        return len(self._skipped) >= PATIENCE

    def stepped(self) -> None:
        """A step was taken: reset the count."""
        self._skipped, self.before = [], None

    def skipped(self, state: TrainState, accumulator: MetricAccumulator) -> None:
        """The step after ``state`` was skipped: report why, on which rank, with which samples (a collective)."""
        if self.before is None:
            self.before = state
        self._skipped.append(state.step + 1)
        found = self._world.gather_object_to_main(self._odd_samples(state.step, accumulator))
        if not self._world.is_main:
            return
        record = {"step": state.step + 1, "ranks": {str(rank): odd for rank, odd in enumerate(found) if odd}}
        with appending(self._folder / SKIPPED) as file:
            file.write(json.dumps(record) + "\n")
        losses = [f"rank {rank}, samples {_listed(odd)}" for rank, odd in enumerate(found) if odd]
        why = f"loss not finite on {'; '.join(losses)}" if losses else "gradient not finite, all losses finite"
        self._world.print_rank0(f"step {state.step + 1}: skipped on all ranks, {why} ({self._folder / SKIPPED})")

    def refusal(self) -> ValueError:
        """The error that ends the run once :attr:`exhausted`; the checkpoint before has been saved."""
        first, last = self._skipped[0], self._skipped[-1]
        return ValueError(
            f"steps {first} to {last} were not finite, {PATIENCE} in a row; the checkpoint of step {first - 1} is from "
            f"before them; check their samples ({self._folder / SKIPPED}) or lower --lr, and start again"
        )

    def _odd_samples(self, step: int, accumulator: MetricAccumulator) -> list[int]:
        """Keys of this rank's samples in micro-batches whose loss is not finite."""
        keys, batches = self._loader.data.stats.keys, self._loader.sampler.microbatches(step, self._loader.rank)
        odd: list[int] = []
        for indices, loss in zip(batches, accumulator.forwards):
            if not bool(loss.isfinite()):
                odd += [int(keys[index]) for index in indices]
        return odd


def _listed(keys: list[int], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(map(str, keys[:most])) + more
