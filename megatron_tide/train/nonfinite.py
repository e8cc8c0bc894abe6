"""Steps whose loss or gradient is not finite: left out on all ranks together, named, and not too many in a row.

DeepSpeed leaves a step out when the norm of the gradient is not finite. The norm is global, so one rank's bad sample
leaves all ranks' step out, and weights and moments stay as they were. What is left to do is to say whose sample it was.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_tide.train.checkpoint import TrainState
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.metrics import MetricAccumulator
from megatron_tide.train.microbatches import MicrobatchLoader

PATIENCE = 10  # steps in a row that may be left out
SKIPPED = "skipped.jsonl"


class NonFiniteGuard:
    """Counts the steps that were left out in a row; ``before`` is the state before the first of them."""

    def __init__(self, folder: Path, loader: MicrobatchLoader, world: DistContext) -> None:
        self._folder, self._windows, self._world = folder, loader, world
        self._left_out: list[int] = []
        self.before: TrainState | None = None

    @property
    def exhausted(self) -> bool:
        return len(self._left_out) >= PATIENCE

    def stepped(self) -> None:
        """A step was taken: the row ends."""
        self._left_out, self.before = [], None

    def skipped(self, state: TrainState, accumulator: MetricAccumulator) -> None:
        """The step after ``state`` was left out: say why, on which rank, with which samples (a collective)."""
        if self.before is None:
            self.before = state
        self._left_out.append(state.step + 1)
        found = self._world.gather_object_to_main(self._odd_samples(state.step, accumulator))
        if not self._world.is_main:
            return
        record = {"step": state.step + 1, "ranks": {str(rank): odd for rank, odd in enumerate(found) if odd}}
        with (self._folder / SKIPPED).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        losses = [f"rank {rank}, samples {_listed(odd)}" for rank, odd in enumerate(found) if odd]
        why = f"loss not finite on {'; '.join(losses)}" if losses else "gradient not finite, though every loss is"
        self._world.print_rank0(f"step {state.step + 1}: left out on all ranks, {why} ({self._folder / SKIPPED})")

    def refusal(self) -> ValueError:
        """Why the run ends; for when :attr:`exhausted`, and the checkpoint before has been saved."""
        first, last = self._left_out[0], self._left_out[-1]
        return ValueError(
            f"steps {first} to {last} were not finite, {PATIENCE} in a row; the checkpoint of step {first - 1} is from "
            f"before them; look at their samples ({self._folder / SKIPPED}) or lower --lr, and start again"
        )

    def _odd_samples(self, step: int, accumulator: MetricAccumulator) -> list[int]:
        """Keys of this rank's samples in micro-batches whose loss is not finite."""
        keys, batches = self._windows.data.stats.keys, self._windows.sampler.microbatches(step, self._windows.rank)
        odd: list[int] = []
        for indices, loss in zip(batches, accumulator.forwards):
            if not bool(loss.isfinite()):
                odd += [int(keys[index]) for index in indices]
        return odd


def _listed(keys: list[int], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(map(str, keys[:most])) + more
