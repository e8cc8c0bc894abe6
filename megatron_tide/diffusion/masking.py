"""The timestep and the masks of a batch, on both sides, so that a chunk is masked on both or on neither.

Shapes: B samples, S student positions, T teacher positions, C chunks of the sample that has most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from megatron_tide.diffusion.counter_rng import uniform_rows

if TYPE_CHECKING:
    from megatron_tide.data.batch import Batch, Tokens

_STREAM = b"noise"


@dataclass(frozen=True)
class Noise:
    """What is masked in one batch.

    t [B] float64 in (0, 1]: the timestep, which is also the masking rate (linear schedule). student_masked bool [B, S],
    teacher_masked bool [B, T] (None for one-sided data), chunk_masked bool [B, C]. ``seed`` and ``epoch`` are those of
    the draws: the CompDemo split belongs to the same ones.
    """

    t: torch.Tensor
    student_masked: torch.Tensor
    teacher_masked: torch.Tensor | None
    chunk_masked: torch.Tensor
    seed: int
    epoch: int


class Masking(Protocol):
    """How the draws of a chunk's student tokens become the one draw of the chunk (masked if below t)."""

    def chunk_draws(self, draws_BS: torch.Tensor, index_BS: torch.Tensor, chunks: int) -> torch.Tensor:
        """[B, chunks] from [B, S]; ``index_BS`` holds each token's chunk, or ``chunks`` for a token of none."""
        ...


@dataclass(frozen=True)
class TokenExpandedMasking:
    """As published: tokens are drawn, and one drawn token masks its whole chunk on both sides.

    A token's true masking rate is therefore 1 - (1 - t)^n in a chunk of n student tokens, above t for n > 1.
    """

    def chunk_draws(self, draws_BS: torch.Tensor, index_BS: torch.Tensor, chunks: int) -> torch.Tensor:
        """The smallest draw of the chunk's tokens: below t as soon as one of them is."""
        return _smallest(draws_BS, index_BS, chunks)


@dataclass(frozen=True)
class ChunkMasking:
    """Chunks are drawn, each with probability t: every token's rate is exactly t, so the denoising loss is unbiased."""

    def chunk_draws(self, draws_BS: torch.Tensor, index_BS: torch.Tensor, chunks: int) -> torch.Tensor:
        """The draw of the chunk's first token stands for the chunk; the others are not looked at."""
        length = draws_BS.shape[1]
        position_BS = torch.arange(length, dtype=draws_BS.dtype).expand_as(index_BS)
        first_BC = _smallest(position_BS, index_BS, chunks).clamp(max=length).long()
        # A chunk the sample does not have starts after its last token: no draw, never masked.
        return torch.nn.functional.pad(draws_BS, (0, 1), value=torch.inf).gather(1, first_BC)


MASKINGS: dict[str, Masking] = {"expand": TokenExpandedMasking(), "synchronous": ChunkMasking()}


def noise(
    batch: Batch,
    *,
    seed: int,
    epoch: int,
    masking: Masking,
    eps: float = 1e-3,
    t: torch.Tensor | np.ndarray | None = None,
) -> Noise:
    """Draw the noise of a batch: a pure function of (seed, epoch, sample key), whatever the batch around a sample.

    t is uniform in (eps, 1), one a sample, unless given ([B], in (0, 1]; the masks then use the same draws against the
    given rates). Units of masking on the student's side: chunks, and each response token that no chunk covers. On the
    teacher's side chunks follow the student, and response tokens that no chunk covers are always masked: they have no
    counterpart whose secret they could keep. A sample may end with nothing masked.

    Raises ValueError for an eps outside [0, 1) or timesteps of the wrong shape or range.
    """
    if not 0 <= eps < 1:
        raise ValueError(f"eps = {eps}: the smallest timestep must lie in [0, 1)")
    student = batch.student
    response_BS = response(student)
    draws = uniform_rows(seed, epoch, batch.keys, 1 + student.length - student.prompt, _STREAM)
    t_B = eps + (1 - eps) * draws[:, 0] if t is None else _given(t, len(draws))

    # The draw after the timestep's belongs to the first response token, and so on: prompts cost none.
    place_BS = 1 + torch.arange(student.ids.shape[1]) - student.prompt[:, None]
    token_draws_BS = draws.gather(1, place_BS.clamp(0, draws.shape[1] - 1)).where(response_BS, torch.inf)
    chunks = int(batch.chunks.max())
    index_BS = torch.where(response_BS & (student.chunk >= 0), student.chunk, chunks).long()
    chunk_masked_BC = masking.chunk_draws(token_draws_BS, index_BS, chunks) < t_B[:, None]

    with_none_BC1 = torch.cat([chunk_masked_BC, torch.zeros(len(t_B), 1, dtype=torch.bool)], 1)
    student_masked_BS = torch.where(index_BS < chunks, with_none_BC1.gather(1, index_BS), token_draws_BS < t_B[:, None])
    teacher_masked_BT = None if batch.teacher is None else _follow(batch.teacher, with_none_BC1)
    return Noise(t_B, student_masked_BS, teacher_masked_BT, chunk_masked_BC, seed, epoch)


def response(tokens: Tokens) -> torch.Tensor:
    """bool [B, S]: the maskable positions, from the end of the prompt to the sample's length."""
    position_S = torch.arange(tokens.ids.shape[1])
    return (position_S >= tokens.prompt[:, None]) & (position_S < tokens.length[:, None])


def _given(t: torch.Tensor | np.ndarray, samples: int) -> torch.Tensor:
    t_B = torch.as_tensor(t, dtype=torch.float64)
    if t_B.shape != (samples,):
        raise ValueError(f"timesteps of shape {list(t_B.shape)} for a batch of {samples}: give one a sample")
    if not bool(((t_B > 0) & (t_B <= 1)).all()):
        raise ValueError("timesteps must lie in (0, 1]: 0 masks nothing and has an infinite loss weight")
    return t_B


def _follow(teacher: Tokens, with_none_BC1: torch.Tensor) -> torch.Tensor:
    """The teacher's mask: each chunk as on the student's side; response tokens of no chunk always."""
    in_chunk_BT = teacher.chunk >= 0
    none = with_none_BC1.shape[1] - 1
    follows_BT = with_none_BC1.gather(1, torch.where(in_chunk_BT, teacher.chunk, none).long())
    return response(teacher) & (follows_BT | ~in_chunk_BT)


def _smallest(values_BS: torch.Tensor, index_BS: torch.Tensor, chunks: int) -> torch.Tensor:
    """[B, chunks]: the smallest value of each chunk, +inf for a chunk the sample does not have."""
    smallest = torch.full((len(values_BS), chunks + 1), torch.inf, dtype=values_BS.dtype)
    return smallest.scatter_reduce_(1, index_BS, values_BS, "amin")[:, :chunks]
