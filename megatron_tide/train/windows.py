"""The windows of a run: for each optimizer step, this rank's noised micro-batches. A pure function of (seed, step).

    order (which samples)  ->  collate (one batch)  ->  noise (t, masks)  ->  view (model inputs and row indices)

All of it is host work; a thread prepares windows ahead of the step that uses them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from megatron_tide.data import GlobalOrder, PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.diffusion import Masking, Noised, TeacherView, noise, view

AHEAD = 2  # windows prepared before they are needed
T = TypeVar("T")


@dataclass(frozen=True)
class Windows:
    """``windows(step)`` is the accumulation window of that step on this rank."""

    data: PreparedData
    order: GlobalOrder
    masking: Masking
    teacher: TeacherView | None
    seed: int
    rank: int
    pin_memory: bool

    def __call__(self, step: int) -> list[Noised]:
        epoch = self.order.epoch(step)
        return [self._noised(indices, epoch) for indices in self.order.window(step, self.rank)]

    def _noised(self, indices: Iterable[int], epoch: int) -> Noised:
        batch = read_batch(self.data, indices)
        drawn = noise(batch, seed=self.seed, epoch=epoch, masking=self.masking)
        student = self.data.manifest["student"]
        noised = view(
            batch, drawn, student_block=student["block"], student_mask_id=student["mask_id"], teacher=self.teacher
        )
        return noised.pin_memory() if self.pin_memory else noised

    def from_step(self, first: int, total: int) -> Iterator[list[Noised]]:
        """Windows of steps first .. total - 1, prepared ahead."""
        return ahead(self, range(first, total))


def ahead(make: Callable[[int], T], steps: Iterable[int]) -> Iterator[T]:
    """``map(make, steps)``, with up to AHEAD results made early by a thread; its error is raised here, in order."""
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(AHEAD)
    stopped = threading.Event()

    def work() -> None:
        try:
            for step in steps:
                if stopped.is_set():
                    return
                results.put((make(step), None))
        except BaseException as error:  # handed to the consumer
            results.put((None, error))
            return
        results.put((None, StopIteration()))

    worker = threading.Thread(target=work, daemon=True, name="windows")
    worker.start()
    try:
        while True:
            result, error = results.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
    finally:
        stopped.set()
        while worker.is_alive():  # room for a result that it is waiting to hand over
            try:
                results.get_nowait()
            except queue.Empty:
                worker.join(0.05)
