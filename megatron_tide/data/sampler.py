"""Which samples make up which step: a pure function of (seed, epoch, step), the same for every topology.

An epoch is a counter-based permutation of all samples. Groups of a few consecutive global batches are sorted by length
and cut into global batches again, so that a batch holds samples of similar length, and the batches of the epoch are
shuffled. This order does not depend on world size or micro-batch size, which only split each global batch over ranks.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from megatron_tide.data.prepared import Stats

_GROUP = 16  # global batches sorted together at most
_LEAST_GROUPS = 4  # and fewer where the epoch is short: one sorted group would repeat the same batches every epoch

Indices = NDArray[np.int64]


class DistributedBatchSampler:
    """The samples of each rank for each step.

    ``global_batch_size``: samples per optimizer step over all ranks; ``micro_batch_size``: samples per forward on one
    rank; ``world``: number of ranks. ``accumulation`` = global_batch_size / (micro_batch_size * world) forwards per
    step and rank. ``steps_per_epoch`` counts complete global batches; the remaining samples, different ones in each
    epoch, are dropped. ValueError when the numbers do not divide or an epoch has no complete global batch.
    """

    def __init__(self, stats: Stats, global_batch_size: int, micro_batch_size: int, world: int, seed: int) -> None:
        _check_division(global_batch_size, micro_batch_size, world)
        if len(stats) < global_batch_size:
            raise ValueError(
                f"--global-batch-size {global_batch_size} is more than the {len(stats)} prepared samples: "
                f"prepare more data or use a global batch size of at most {len(stats)}"
            )
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.world = world
        self.accumulation = global_batch_size // (micro_batch_size * world)
        self.steps_per_epoch = len(stats) // global_batch_size
        self._seed = seed
        self._length = stats.student_length.astype(np.int64) + stats.teacher_length
        self._epoch = -1
        self._batches: Indices = np.zeros((0, global_batch_size), np.int64)

    def epoch(self, step: int) -> int:
        """The epoch that global step ``step`` (counted from 0 over all epochs) belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Indices:
        """The samples of global batch ``step``, int64 [global_batch_size], longest first."""
        epoch = self.epoch(step)
        if epoch != self._epoch:
            self._batches, self._epoch = self._shuffled(epoch), epoch
        return self._batches[step - epoch * self.steps_per_epoch]

    def microbatches(self, step: int, rank: int) -> list[Indices]:
        """The micro-batches of ``rank`` for ``step``: ``accumulation`` arrays int64 [micro_batch_size].

        Micro-batch k of all ranks together is slice k of the batch sorted by length, dealt in turn: ranks wait for one
        another in every forward, so what they do at the same time should be of the same size.
        """
        return self._share(self.batch(step), rank)

    def strata(self, step: int, rank: int) -> list[Indices]:
        """For the samples of ``microbatches``: a number of each, 0 .. global_batch_size - 1, drawn by (seed, step)."""
        return self._share(permutation(self.global_batch_size, self._seed, step, b"strata"), rank)

    def _share(self, of_batch: Indices, rank: int) -> list[Indices]:
        slices = of_batch.reshape(self.accumulation, self.micro_batch_size, self.world)
        return [part[:, rank] for part in slices]

    def _shuffled(self, epoch: int) -> Indices:
        steps, size = self.steps_per_epoch, self.global_batch_size
        order = permutation(len(self._length), self._seed, epoch, b"samples")[: steps * size]
        group = min(_GROUP, max(1, steps // _LEAST_GROUPS)) * size
        group_of = np.arange(len(order)) // group
        # Equal lengths keep the permutation's order, so the result is one even where lengths tie.
        order = order[np.lexsort((-self._length[order], group_of))]
        return order.reshape(steps, size)[permutation(steps, self._seed, epoch, b"batches")]


def permutation(count: int, seed: int, number: int, stream: bytes) -> Indices:
    """A permutation of ``count``, drawn by (seed, number) from raw Philox numbers: numpy's own shuffles may change
    between versions.
    """
    key = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=16, person=stream).digest()
    philox = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64))
    return np.argsort(philox.random_raw(count), kind="stable")


def _check_division(global_batch_size: int, micro_batch_size: int, world: int) -> None:
    if min(global_batch_size, micro_batch_size, world) < 1:
        raise ValueError(
            f"--global-batch-size {global_batch_size}, --micro-batch-size {micro_batch_size}, ranks {world}: "
            "all must be >= 1"
        )
    unit = micro_batch_size * world
    if global_batch_size % unit == 0:
        return
    near = [size for size in (global_batch_size // unit * unit, (global_batch_size // unit + 1) * unit) if size]
    advice = f"use a global batch size of {' or '.join(map(str, near))}"
    if global_batch_size % world == 0:
        share = global_batch_size // world
        advice += f", or a micro-batch size that divides {share}: {_divisors(share)}"
    raise ValueError(
        f"--global-batch-size {global_batch_size} is not a multiple of --micro-batch-size {micro_batch_size} x {world} "
        f"ranks = {unit}: {advice}"
    )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
