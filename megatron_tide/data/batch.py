"""Samples -> padded tensors on the CPU. The only file of the package that needs torch.

Shape suffixes: B samples, S student tokens, T teacher tokens (each the longest of the batch, up to its block multiple).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_tide.data.prepared import PreparedData
from megatron_tide.data.shard import PROMPT, Sample, TokenizedSample


@dataclass(frozen=True)
class Tokens:
    """One side of a batch: ``ids`` int64 [B,S]; ``chunk`` int32 [B,S] (>= 0 chunk, -1 prompt or padding, -2 response
    token without a chunk); ``length``, ``prompt`` and ``content_end`` int64 [B]. Positions from ``length`` on are
    padding, positions up to ``content_end`` (inclusive) are scored."""

    ids: torch.Tensor
    chunk: torch.Tensor
    length: torch.Tensor
    prompt: torch.Tensor
    content_end: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A micro-batch: sample ``keys`` and ``chunks`` int64 [B], and its sides; no ``teacher`` in student-only data.

    ``own`` bool [B]: whether the student wrote the response; None: it wrote none of the data's. ``order`` int32 [B, S]:
    the pass of its decoding that decided a token, 0 for none; None: not known of any sample of the data."""

    keys: torch.Tensor
    student: Tokens
    teacher: Tokens | None
    chunks: torch.Tensor
    own: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)


def collate(
    samples: Sequence[Sample],
    *,
    student_block: int,
    teacher_block: int = 1,
    student_pad: int = 0,
    teacher_pad: int = 0,
) -> Batch:
    """Pad samples (at least one) to the longest, rounded up to a full block."""
    teachers = [sample.teacher for sample in samples if sample.teacher is not None]
    assert len(teachers) in (0, len(samples)), "all samples of a batch have a teacher, or none has"
    return Batch(
        keys=torch.tensor([sample.key for sample in samples], dtype=torch.int64),
        student=_pad([sample.student for sample in samples], student_block, student_pad),
        teacher=_pad(teachers, teacher_block, teacher_pad) if teachers else None,
        chunks=torch.tensor([sample.chunks for sample in samples], dtype=torch.int64),
        order=_orders([sample.student for sample in samples], student_block),
    )


def read_batch(data: PreparedData, indices: Iterable[int]) -> Batch:
    """Collate the samples ``indices`` of a prepared folder with the folder's own block sizes and pad ids."""
    student, teacher = data.manifest["student"], data.manifest["teacher"] or {"block": 1, "pad_id": 0}
    batch = collate(
        [data.sample(int(index)) for index in indices],
        student_block=student["block"],
        teacher_block=teacher["block"],
        student_pad=student["pad_id"],
        teacher_pad=teacher["pad_id"],
    )
    own = data.own(batch.keys.numpy())
    return batch if own is None else replace(batch, own=torch.from_numpy(own))


def _orders(sides: Sequence[TokenizedSample], block: int) -> torch.Tensor | None:
    if all(side.order is None for side in sides):
        return None
    order = np.zeros((len(sides), _width(sides, block)), np.int32)
    for row, side in enumerate(sides):
        order[row, : len(side.ids)] = 0 if side.order is None else side.order
    return torch.from_numpy(order)


def _width(sides: Sequence[TokenizedSample], block: int) -> int:
    return -(-max(len(side.ids) for side in sides) // block) * block


def _pad(sides: Sequence[TokenizedSample], block: int, pad: int) -> Tokens:
    lengths = [len(side.ids) for side in sides]
    width = _width(sides, block)
    ids = np.full((len(sides), width), pad, np.int64)
    chunk = np.full((len(sides), width), PROMPT, np.int32)
    for row, (side, length) in enumerate(zip(sides, lengths)):
        ids[row, :length] = side.ids
        chunk[row, :length] = side.chunk
    return Tokens(
        ids=torch.from_numpy(ids),
        chunk=torch.from_numpy(chunk),
        length=torch.tensor(lengths, dtype=torch.int64),
        prompt=torch.tensor([side.prompt for side in sides], dtype=torch.int64),
        content_end=torch.tensor([side.content_end for side in sides], dtype=torch.int64),
    )
