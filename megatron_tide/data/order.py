"""Which samples make up which step: a pure function of (seed, epoch, step), the same for every topology.

An epoch is a counter-based permutation of all samples. Groups of a few consecutive global batches are sorted by length
and cut into global batches again, so that a batch holds samples of similar length, and the batches of the epoch are
shuffled. None of that knows the world size or the micro-batch: those only decide how one global batch is dealt out.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from megatron_tide.data.store import Stats

_GROUP = 16  # global batches sorted together at most
_LEAST_GROUPS = 4  # and fewer where the epoch is short: one sorted group would repeat the same batches every epoch

Indices = NDArray[np.int64]


class GlobalOrder:
    """The samples of each rank for each step.

    ``global_batch`` samples a step, ``micro_batch`` a rank and forward, ``world`` ranks that hold different samples.
    ``accumulation`` = global_batch / (micro_batch * world) forwards a step and rank. ``steps_per_epoch`` whole global
    batches; what is left over is dropped, other samples each epoch. ValueError when the numbers do not divide or an
    epoch has no whole global batch.
    """

    def __init__(self, stats: Stats, global_batch: int, micro_batch: int, world: int, seed: int) -> None:
        _check_division(global_batch, micro_batch, world)
        if len(stats) < global_batch:
            raise ValueError(
                f"global_batch {global_batch} is more than the {len(stats)} prepared samples: "
                f"prepare more data or take a global_batch of at most {len(stats)}"
            )
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.world = world
        self.accumulation = global_batch // (micro_batch * world)
        self.steps_per_epoch = len(stats) // global_batch
        self._seed = seed
        self._length = stats.student_length.astype(np.int64) + stats.teacher_length
        self._epoch = -1
        self._batches: Indices = np.zeros((0, global_batch), np.int64)

    def epoch(self, step: int) -> int:
        """The epoch that global step ``step`` (counted from 0 over all epochs) belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> Indices:
        """The samples of global batch ``step``, int64 [global_batch], longest first."""
        epoch = self.epoch(step)
        if epoch != self._epoch:
            self._batches, self._epoch = self._shuffled(epoch), epoch
        return self._batches[step - epoch * self.steps_per_epoch]

    def window(self, step: int, rank: int) -> list[Indices]:
        """The micro-batches of ``rank`` for ``step``: ``accumulation`` arrays int64 [micro_batch].

        Micro-batch k of all ranks together is slice k of the batch sorted by length, dealt in turn: ranks wait for one
        another in every forward, so what they do at the same time should be of the same size.
        """
        slices = self.batch(step).reshape(self.accumulation, self.micro_batch, self.world)
        return [part[:, rank] for part in slices]

    def _shuffled(self, epoch: int) -> Indices:
        steps, size = self.steps_per_epoch, self.global_batch
        order = _permutation(len(self._length), self._seed, epoch, b"samples")[: steps * size]
        group = min(_GROUP, max(1, steps // _LEAST_GROUPS)) * size
        group_of = np.arange(len(order)) // group
        # Equal lengths keep the permutation's order, so the result is one even where lengths tie.
        order = order[np.lexsort((-self._length[order], group_of))]
        return order.reshape(steps, size)[_permutation(steps, self._seed, epoch, b"batches")]


def _permutation(count: int, seed: int, epoch: int, stream: bytes) -> Indices:
    """A permutation of ``count`` from raw Philox words: numpy's own shuffles may change with its version."""
    key = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=16, person=stream).digest()
    philox = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64))
    return np.argsort(philox.random_raw(count), kind="stable")


def _check_division(global_batch: int, micro_batch: int, world: int) -> None:
    if min(global_batch, micro_batch, world) < 1:
        raise ValueError(f"global_batch {global_batch}, micro_batch {micro_batch}, ranks {world}: all must be >= 1")
    unit = micro_batch * world
    if global_batch % unit == 0:
        return
    near = [size for size in (global_batch // unit * unit, (global_batch // unit + 1) * unit) if size]
    advice = f"take a global_batch of {' or '.join(map(str, near))}"
    if global_batch % world == 0:
        share = global_batch // world
        advice += f", or a micro_batch that divides {share}: {_divisors(share)}"
    raise ValueError(
        f"global_batch {global_batch} is no multiple of micro_batch {micro_batch} x {world} ranks = {unit}: {advice}"
    )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
