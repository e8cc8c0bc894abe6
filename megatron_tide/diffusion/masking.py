"""The noise of a batch: rates, and masks on both sides, so that a chunk is masked on both or on neither.

Shapes: B samples, S student positions, T teacher positions, C chunks of the sample with most chunks, N noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from megatron_tide.diffusion.counter_rng import uniform_rows
from megatron_tide.diffusion.noise_schedule import LINEAR, NoiseSchedule

if TYPE_CHECKING:
    from megatron_tide.data.batch import Batch, Tokens

_STREAM = b"noise"


@dataclass(frozen=True)
class Noise:
    """The masks of one batch, and their noise levels.

    A level is one sampled timestep; N of them, float64: ``rate`` [N] in (0, 1], the probability that a token is masked,
    and ``inverse_weight`` [N], which the loss of a masked token is divided by. student_level int64 [B, S] and
    chunk_level int64 [B, C]: the level of each token and chunk. Currently a sample has one level, so N = B and a
    token's level is its sample; code that reads the noise must use the level, not the sample. student_masked bool [B,
    S], teacher_masked bool [B, T] (None for student-only data), chunk_masked bool [B, C]. ``seed`` and ``epoch`` are
    those of the random numbers; the CompDemo split uses the same ones.
    """

    rate: torch.Tensor
    inverse_weight: torch.Tensor
    student_level: torch.Tensor
    chunk_level: torch.Tensor
    student_masked: torch.Tensor
    teacher_masked: torch.Tensor | None
    chunk_masked: torch.Tensor
    seed: int
    epoch: int


class Masking(Protocol):
    """Which chunks are masked, given the sampled student tokens."""

    def chunks(self, drawn_BS: torch.Tensor, index_BS: torch.Tensor, first_BC: torch.Tensor) -> torch.Tensor:
        """bool [B, C] from bool [B, S].

        ``index_BS``: each token's chunk, or C for a token of none. ``first_BC``: each chunk's first token, or S for a
        chunk that the sample does not have, which is not masked.
        """
        ...


@dataclass(frozen=True)
class TokenExpandedMasking:
    """As published: tokens are sampled, and a sampled token masks its complete chunk on both sides.

    A token's true masking rate is therefore 1 - (1 - rate)^n in a chunk of n student tokens, above the rate for n > 1.
    """

    def chunks(self, drawn_BS: torch.Tensor, index_BS: torch.Tensor, first_BC: torch.Tensor) -> torch.Tensor:
        """Masked if at least one of the chunk's tokens is sampled."""
        samples, chunks = first_BC.shape
        count = torch.zeros(samples, chunks + 1, dtype=torch.int32).scatter_add_(1, index_BS, drawn_BS.int())
        return count[:, :chunks] > 0


@dataclass(frozen=True)
class ChunkMasking:
    """Chunks are sampled: each token's masking rate is exactly the noise rate, so the denoising loss is unbiased."""

    def chunks(self, drawn_BS: torch.Tensor, index_BS: torch.Tensor, first_BC: torch.Tensor) -> torch.Tensor:
        """The random number of the chunk's first token decides for the chunk; the others are ignored."""
        return _at_first(drawn_BS, first_BC)


EXPAND, SYNCHRONOUS = TokenExpandedMasking(), ChunkMasking()


def noise(
    batch: Batch,
    *,
    seed: int,
    epoch: int,
    masking: Masking,
    schedule: NoiseSchedule = LINEAR,
    t: torch.Tensor | np.ndarray | None = None,
) -> Noise:
    """Sample the noise of a batch: a pure function of (seed, epoch, sample key), independent of the other samples in
    the batch.

    The schedule samples one timestep per sample, unless ``t`` is given ([B], in (0, 1]; the same random numbers are
    then compared with its rates). Units of masking on the student's side: chunks, and each response token that no chunk
    covers. On the teacher's side chunks follow the student, and response tokens that no chunk covers are always masked:
    the student has no counterpart of them. A sample may end with nothing masked.

    Raises ValueError for timesteps of the wrong shape or range.
    """
    student = batch.student
    response_BS = response(student)
    draws = uniform_rows(seed, epoch, batch.keys, 1 + student.length - student.prompt, _STREAM)
    t_N = schedule.draw(draws[:, 0]) if t is None else _given(t, len(draws))
    rate_N, samples, length = schedule.rate(t_N), *student.ids.shape
    level_BS = torch.arange(samples)[:, None].expand(samples, length)

    # The first random number is for the timestep, the next ones for the response tokens; prompts need none.
    place_BS = 1 + torch.arange(length) - student.prompt[:, None]
    token_draws_BS = draws.gather(1, place_BS.clamp(0, draws.shape[1] - 1))
    drawn_BS = response_BS & (token_draws_BS < rate_N[level_BS])
    chunks = int(batch.chunks.max())
    index_BS = torch.where(response_BS & (student.chunk >= 0), student.chunk, chunks).long()
    first_BC = _first_tokens(index_BS, chunks)
    chunk_masked_BC = masking.chunks(drawn_BS, index_BS, first_BC)

    with_none_BC1 = torch.cat([chunk_masked_BC, torch.zeros(samples, 1, dtype=torch.bool)], 1)
    return Noise(
        rate=rate_N,
        inverse_weight=schedule.inverse_weight(t_N),
        student_level=level_BS,
        chunk_level=_at_first(level_BS, first_BC),
        student_masked=torch.where(index_BS < chunks, with_none_BC1.gather(1, index_BS), drawn_BS),
        teacher_masked=None if batch.teacher is None else _follow(batch.teacher, with_none_BC1),
        chunk_masked=chunk_masked_BC,
        seed=seed,
        epoch=epoch,
    )


def response(tokens: Tokens) -> torch.Tensor:
    """bool [B, S]: the maskable positions, from the end of the prompt to the sample's length."""
    position_S = torch.arange(tokens.ids.shape[1])
    return (position_S >= tokens.prompt[:, None]) & (position_S < tokens.length[:, None])


def _given(t: torch.Tensor | np.ndarray, samples: int) -> torch.Tensor:
    t_B = torch.as_tensor(t, dtype=torch.float64)
    if t_B.shape != (samples,):
        raise ValueError(f"timesteps of shape {list(t_B.shape)} for a batch of {samples}; pass one per sample")
    if not bool(((t_B > 0) & (t_B <= 1)).all()):
        raise ValueError("timesteps must be in (0, 1]: 0 masks nothing and has an infinite loss weight")
    return t_B


def _follow(teacher: Tokens, with_none_BC1: torch.Tensor) -> torch.Tensor:
    """The teacher's mask: chunks as on the student's side; response tokens outside chunks are always masked."""
    in_chunk_BT = teacher.chunk >= 0
    none = with_none_BC1.shape[1] - 1
    follows_BT = with_none_BC1.gather(1, torch.where(in_chunk_BT, teacher.chunk, none).long())
    return response(teacher) & (follows_BT | ~in_chunk_BT)


def _first_tokens(index_BS: torch.Tensor, chunks: int) -> torch.Tensor:
    """int64 [B, chunks]: the position of each chunk's first token, S for a chunk the sample does not have."""
    samples, length = index_BS.shape
    first = torch.full((samples, chunks + 1), length)
    return first.scatter_reduce_(1, index_BS, torch.arange(length).expand_as(index_BS), "amin")[:, :chunks]


def _at_first(values_BS: torch.Tensor, first_BC: torch.Tensor) -> torch.Tensor:
    """[B, C]: the value of each chunk's first token; 0 for a chunk the sample does not have."""
    return torch.nn.functional.pad(values_BS, (0, 1)).gather(1, first_BC)
