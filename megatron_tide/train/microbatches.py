"""The micro-batches of each optimizer step on this rank: a pure function of (seed, step).

    sampler (which samples)  ->  collate (one batch)  ->  noise (rates, masks)  ->  build_inputs (model inputs, indices)

All of it runs on the CPU; a thread prepares micro-batches ahead of the step that uses them, and copies them to the GPU.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_tide.data import DistributedBatchSampler, PreparedData
from megatron_tide.data.batch import read_batch
from megatron_tide.data.sampler import Indices
from megatron_tide.diffusion import (
    DistillBatch,
    Masking,
    NoiseSampling,
    NoiseSchedule,
    TeacherLayout,
    build_inputs,
    noise,
)
from megatron_tide.diffusion.attention import TILE
from megatron_tide.fast import is_on
from megatron_tide.train.phases import Phases
from megatron_tide.train.step import to_device

AHEAD = 2  # steps prepared before they are needed
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class MicrobatchLoader:
    """``loader(step)`` gives this rank's micro-batches of that optimizer step, as its phase needs them."""

    data: PreparedData
    sampler: DistributedBatchSampler
    phases: Phases
    noise_schedule: NoiseSchedule
    noise_sampling: NoiseSampling
    masking: Masking
    teacher: TeacherLayout | None
    seed: int
    rank: int
    for_cuda: bool
    """Lengths in full tiles of flex_attention, its lists of tiles, and page-locked memory."""

    def __call__(self, step: int) -> list[DistillBatch]:
        shares = zip(self.sampler.microbatches(step, self.rank), self.sampler.strata(step, self.rank))
        return [self._build(indices, stratum, step) for indices, stratum in shares]

    def _build(self, indices: Indices, stratum: Indices, step: int) -> DistillBatch:
        batch, strategy, block = read_batch(self.data, indices), self.phases.at(step).strategy, self.phases.block(step)
        drawn = noise(
            batch,
            seed=self.seed,
            epoch=self.sampler.epoch(step),
            masking=self.masking,
            schedule=self.noise_schedule,
            sampling=self.noise_sampling,
            block=block,
            strata=(stratum, self.sampler.global_batch_size),
        )
        inputs = build_inputs(
            batch,
            drawn,
            student=strategy.student,
            student_block=block,
            student_mask_id=self.data.manifest["student"]["mask_id"],
            teacher=self.teacher if strategy.needs_teacher else None,
        )
        if not self.for_cuda:
            return inputs
        inputs = inputs.padded(TILE)
        return (inputs.with_tiles() if is_on("masks") else inputs).pin_memory()

    def from_step(self, first: int, total: int, device: torch.device) -> Iterator[list[DistillBatch]]:
        """Micro-batches of steps first .. total - 1 on the device, prepared and copied ahead by a thread."""
        upload = Upload(device)
        for sent in ahead(lambda step: upload.send(self(step)), range(first, total)):
            yield upload.receive(sent)


@dataclass(frozen=True)
class Sent:
    """Micro-batches on their way to the device; ``ready``: when they are there."""

    microbatches: list[DistillBatch]
    ready: torch.cuda.Event | None = None


class Upload:
    """Copies micro-batches to a GPU on a stream of its own, from the loader's thread: the step waits for no copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and is_on("upload") else None

    def send(self, microbatches: list[DistillBatch]) -> Sent:
        """From any thread."""
        if self.stream is None:
            return Sent(microbatches)
        with torch.cuda.stream(self.stream):
            return Sent(to_device(microbatches, self.device), self.stream.record_event())

    def receive(self, sent: Sent) -> list[DistillBatch]:
        """For the stream that the step runs on."""
        if sent.ready is None:
            return to_device(sent.microbatches, self.device)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(sent.ready)
        for batch in sent.microbatches:
            batch.record_stream(stream)  # made on the other stream, whose allocations do not know of this one
        return sent.microbatches


def ahead(make: Callable[[S], T], steps: Iterable[S]) -> Iterator[T]:
    """``map(make, steps)``, with up to AHEAD results computed early by a thread; errors are raised here, in order."""
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

    worker = threading.Thread(target=work, daemon=True, name="microbatches")
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
        while worker.is_alive():  # make room for a result that the thread is waiting to put
            try:
                results.get_nowait()
            except queue.Empty:
                worker.join(0.05)
