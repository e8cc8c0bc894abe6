"""A noised batch in the form the training step needs: two model inputs, and indices of the scored positions.

Shapes: B samples, S / T positions of student / teacher, M masked student rows, Q next-token rows, R teacher rows, K
active chunks, P pairs, N noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch

from megatron_tide.diffusion.compdemo import CompDemo
from megatron_tide.diffusion.layouts import BLOCKS, AttentionLayout, ModelInput, StudentLayout, predicts_next
from megatron_tide.diffusion.masking import Noise, response
from megatron_tide.diffusion.tensor_dataclass import TensorDataclass

if TYPE_CHECKING:
    from megatron_tide.data.batch import Batch, Tokens


@dataclass(frozen=True)
class TeacherLayout:
    """The teacher's input: attention layout (of ATTENTION_LAYOUTS), block size, mask token, CompDemo or one pass.

    ``mask_id`` has no meaning where ``predicts_next(context)``. ``first_rows``: whether the first rows of chunks of
    several tokens are compared too (``DistillBatch.pair_several``).
    """

    context: AttentionLayout
    block: int
    mask_id: int
    compdemo: CompDemo | None = None
    first_rows: bool = False


@dataclass(frozen=True)
class DistillBatch(TensorDataclass):
    """One noised micro-batch, ready for both models; every index is int64 and was computed on the CPU.

    rate, inverse_weight float32 [N]: of each noise level (see ``Noise``). student: the input whose first rows are all
    masked student tokens, in (sample, position) order; student_targets [M] their tokens, student_level [M] their
    noise, student_chunk [M] the active chunk each belongs to, or -1. Its other rows, next_targets [Q], are those of the
    next-token loss (``StudentLayout``).
    teacher (None without one): its rows are the scored tokens of the active chunks, in (sample, position) order;
    teacher_targets [R], teacher_chunk [R]. An active chunk is masked completely on both sides; chunk_level [K]: its
    noise. Pairs are the active chunks of exactly one scored token on each side: pair_student_index [P] into M,
    pair_teacher_index [P] into R, pair_chunk [P] into K. With ``TeacherLayout.first_rows`` there is a pair for every
    active chunk, of its first row on each side; pair_several indexes those of more than one token (None: there is no
    such pair). maskable: number of maskable student tokens of the
    micro-batch, 0 if nothing is denoised; tokens: number of all its student tokens, without padding. Without a teacher
    K = R = P = 0. gold int64 [m] indexes those of the M masked tokens that are not the student's own writing, which
    denoising scores (None: all of them); next-token rows have none of it. keys int64 [B]: the samples' own numbers;
    draw: (seed, epoch) of the noise.
    """

    rate: torch.Tensor
    inverse_weight: torch.Tensor
    student: ModelInput
    student_targets: torch.Tensor
    student_level: torch.Tensor
    student_chunk: torch.Tensor
    next_targets: torch.Tensor
    teacher: ModelInput | None
    teacher_targets: torch.Tensor
    teacher_chunk: torch.Tensor
    chunk_level: torch.Tensor
    pair_student_index: torch.Tensor
    pair_teacher_index: torch.Tensor
    pair_chunk: torch.Tensor
    maskable: int
    tokens: int = 0
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    draw: tuple[int, int] = (0, 0)
    pair_several: torch.Tensor | None = None
    gold: torch.Tensor | None = None

    def padded(self, multiple: int) -> DistillBatch:
        """Both models' inputs with lengths that are multiples of ``multiple`` (:meth:`ModelInput.padded`)."""
        teacher = self.teacher and self.teacher.padded(multiple)
        return replace(self, student=self.student.padded(multiple), teacher=teacher)

    def with_tiles(self) -> DistillBatch:
        """Both models' inputs with flex_attention's lists of tiles."""
        return replace(self, student=self.student.with_tiles(), teacher=self.teacher and self.teacher.with_tiles())


def build_inputs(
    batch: Batch,
    noise: Noise,
    *,
    student_block: int,
    student_mask_id: int,
    teacher: TeacherLayout | None,
    student: StudentLayout = BLOCKS,
) -> DistillBatch:
    """Lay out ``batch`` under ``noise`` for the student and, if given, for the teacher.

    Raises ValueError for a teacher and data that was prepared without one.
    """
    if teacher is not None and batch.teacher is None:
        raise ValueError("this data has no teacher tokens; prepare it with a bridge, or train without a teacher")
    active_BC = _scorable(batch, noise, teacher)
    chunk_level_K = noise.chunk_level[active_BC]
    chunk_id_BC = torch.where(active_BC, active_BC.flatten().cumsum(0).view_as(active_BC) - 1, -1)

    masked_BS = student.masked(noise.student_masked)
    sample_M, position_M = masked_BS.nonzero(as_tuple=True)
    sample_Q, position_Q = student.next_tokens(batch.student, batch.own).nonzero(as_tuple=True)
    student_input = student.input(
        batch.student,
        masked_BS,
        (sample_M, position_M),
        (sample_Q, position_Q),
        block=student_block,
        mask_id=student_mask_id,
    )
    student_chunk_M = _active(batch.student, chunk_id_BC)[sample_M, position_M]
    teacher_input, targets_R, teacher_chunk_R = _teacher_input(batch, noise, chunk_id_BC, teacher)
    first_rows = teacher is not None and teacher.first_rows
    pairs = _pairs(student_chunk_M, teacher_chunk_R, len(chunk_level_K), first_rows)
    return DistillBatch(
        rate=noise.rate.float(),
        inverse_weight=noise.inverse_weight.float(),
        student=student_input,
        student_targets=batch.student.ids[sample_M, position_M],
        student_level=noise.student_level[sample_M, position_M],
        student_chunk=student_chunk_M,
        next_targets=batch.student.ids[sample_Q, position_Q],
        teacher=teacher_input,
        teacher_targets=targets_R,
        teacher_chunk=teacher_chunk_R,
        chunk_level=chunk_level_K,
        pair_student_index=pairs[0],
        pair_teacher_index=pairs[1],
        pair_chunk=pairs[2],
        pair_several=pairs[3] if first_rows else None,
        gold=None if batch.own is None else (~batch.own[sample_M]).nonzero()[:, 0],
        maskable=int(response(batch.student).sum()) * student.denoise,
        tokens=int(batch.student.length.sum()),
        keys=batch.keys,
        draw=(noise.seed, noise.epoch),
    )


def _scorable(batch: Batch, noise: Noise, teacher: TeacherLayout | None) -> torch.Tensor:
    """bool [B, C]: the masked chunks, without those of which the teacher cannot predict every token."""
    if teacher is None:
        return torch.zeros_like(noise.chunk_masked)
    if not predicts_next(teacher.context):
        return noise.chunk_masked
    assert batch.teacher is not None
    return noise.chunk_masked & (torch.arange(noise.chunk_masked.shape[1]) != batch.teacher.chunk[:, :1])


def _teacher_input(
    batch: Batch, noise: Noise, chunk_id_BC: torch.Tensor, teacher: TeacherLayout | None
) -> tuple[ModelInput | None, torch.Tensor, torch.Tensor]:
    """The teacher's input, the target tokens [R] of its rows and their active chunks [R]."""
    if teacher is None:
        return None, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    tokens, masked = batch.teacher, noise.teacher_masked
    assert tokens is not None
    assert masked is not None
    active_BT = _active(tokens, chunk_id_BC)
    # EOS after the first only fill the last block: they are masked with the end chunk and never scored.
    content_BT = torch.arange(tokens.ids.shape[1]) <= tokens.content_end[:, None]
    sample_R, position_R = (content_BT & (active_BT >= 0)).nonzero(as_tuple=True)
    targets_R, chunk_R = tokens.ids[sample_R, position_R], active_BT[sample_R, position_R]
    if teacher.compdemo is not None:
        assert not predicts_next(teacher.context), "CompDemo reveals masks, which a causal teacher has not"
        first_BT = teacher.compdemo.split(batch, noise, noise.seed, noise.epoch)
        second_BT = masked & (tokens.chunk >= 0) & ~first_BT
        # The first B sequences reveal the first half and are read at the second; the other B the reverse.
        masked = torch.cat([masked & ~first_BT, masked & ~second_BT])
        sample_R = sample_R + len(tokens.ids) * first_BT[sample_R, position_R]
        tokens = _twice(tokens)
    model_input = teacher.context(tokens, masked, sample_R, position_R, block=teacher.block, mask_id=teacher.mask_id)
    return model_input, targets_R, chunk_R


def _active(tokens: Tokens, chunk_id_BC: torch.Tensor) -> torch.Tensor:
    """int64 [B, S]: the active chunk of each token, -1 for a token in none."""
    none_B1 = torch.full((len(chunk_id_BC), 1), -1)
    index_BS = torch.where(tokens.chunk >= 0, tokens.chunk, chunk_id_BC.shape[1]).long()
    return torch.cat([chunk_id_BC, none_B1], 1).gather(1, index_BS)


def _pairs(
    student_chunk_M: torch.Tensor, teacher_chunk_R: torch.Tensor, chunks: int, first_rows: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the chunks with one row on each side, or of all (``first_rows``): the student's first row, the teacher's, the
    chunk, [P] each; and which of them have more rows on a side.
    """
    student_rows_K, student_row_K = _first_row(student_chunk_M, chunks)
    teacher_rows_K, teacher_row_K = _first_row(teacher_chunk_R, chunks)
    single_K = (student_rows_K == 1) & (teacher_rows_K == 1)
    pair_chunk_P = (single_K | first_rows).nonzero()[:, 0]
    several = (~single_K[pair_chunk_P]).nonzero()[:, 0]
    return student_row_K[pair_chunk_P], teacher_row_K[pair_chunk_P], pair_chunk_P, several


def _first_row(chunk_of_row: torch.Tensor, chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [K]: how many rows a chunk has, and the first of them."""
    row = (chunk_of_row >= 0).nonzero()[:, 0]
    chunk = chunk_of_row[row]
    first_K = torch.full((chunks,), len(chunk_of_row)).scatter_reduce(0, chunk, row, "amin")
    return torch.bincount(chunk, minlength=chunks), first_K


def _twice(tokens: Tokens) -> Tokens:
    return replace(tokens, **{field.name: torch.cat([getattr(tokens, field.name)] * 2) for field in fields(tokens)})
