"""The noise of a batch: rates, and masks on both sides, so that a chunk is masked on both or on neither.

Shapes: B samples, S student positions, T teacher positions, C chunks of the sample with most chunks, N noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from megatron_tide.diffusion.counter_rng import uniform_rows
from megatron_tide.diffusion.decoding_order import share_masked, undecided
from megatron_tide.diffusion.levels import PUBLISHED, Levels, NoiseSampling, Strata, rank_within
from megatron_tide.diffusion.noise_schedule import LINEAR, NoiseSchedule

if TYPE_CHECKING:
    from megatron_tide.data.batch import Batch, Tokens

_STREAM = b"noise"


@dataclass(frozen=True)
class Noise:
    """The masks of one batch, and their noise levels.

    A level is one sampled timestep; N of them, float64: ``rate`` [N] in (0, 1], the probability that a token is masked,
    and ``inverse_weight`` [N], which the loss of a masked token is divided by. level_sample int64 [N]: the sample of
    each level; as published a sample has one (N = B), or else each of its blocks has its own. student_level int64 [B,
    S] and chunk_level int64 [B, C]: the level of each token and chunk, without meaning where nothing can be masked.
    student_masked bool [B, S], teacher_masked bool [B, T] (None for student-only data), chunk_masked bool [B, C].
    ``seed`` and ``epoch`` are those of the random numbers; the CompDemo split uses the same ones.
    """

    rate: torch.Tensor
    inverse_weight: torch.Tensor
    level_sample: torch.Tensor
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

    def units(self, response_BS: torch.Tensor, anchor_BS: torch.Tensor) -> torch.Tensor:
        """bool [B, S]: the tokens whose random numbers decide, one per unit.

        ``anchor_BS``: the first token of each token's chunk, or the token itself.
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

    def units(self, response_BS: torch.Tensor, anchor_BS: torch.Tensor) -> torch.Tensor:
        """Each response token."""
        return response_BS


@dataclass(frozen=True)
class ChunkMasking:
    """Chunks are sampled: each token's masking rate is exactly the noise rate, so the denoising loss is unbiased."""

    def chunks(self, drawn_BS: torch.Tensor, index_BS: torch.Tensor, first_BC: torch.Tensor) -> torch.Tensor:
        """The random number of the chunk's first token decides for the chunk; the others are ignored."""
        return _at_first(drawn_BS, first_BC)

    def units(self, response_BS: torch.Tensor, anchor_BS: torch.Tensor) -> torch.Tensor:
        """Each chunk's first token, and each response token that no chunk covers."""
        return response_BS & (anchor_BS == torch.arange(anchor_BS.shape[1]))


EXPAND, SYNCHRONOUS = TokenExpandedMasking(), ChunkMasking()


def noise(
    batch: Batch,
    *,
    seed: int,
    epoch: int,
    masking: Masking,
    schedule: NoiseSchedule = LINEAR,
    sampling: NoiseSampling = PUBLISHED,
    block: int = 0,
    strata: Strata | None = None,
    t: torch.Tensor | np.ndarray | None = None,
) -> Noise:
    """Sample the noise of a batch: a pure function of (seed, epoch, sample key), and of the sample's stratum where they
    are stratified; independent of the other samples in the batch.

    ``sampling`` says which timesteps are drawn; ``block`` (the student's, in tokens) is needed where each block has its
    own, ``strata`` to stratify them over more than one sample. ``t`` replaces them: [B], or [B, J] for the blocks of
    each response, in (0, 1]; the same random numbers are then compared with its rates. Units of masking on the
    student's side: chunks, and each response token that no chunk covers. On the teacher's side chunks follow the
    student, and response tokens that no chunk covers are always masked: the student has no counterpart of them. A level
    may end with nothing masked, except with ``sampling.exact``.

    Raises ValueError for timesteps of the wrong shape or range.
    """
    student, chunks = batch.student, int(batch.chunks.max())
    response_BS, length = response(student), student.ids.shape[1]
    draws = uniform_rows(seed, epoch, batch.keys, 1 + student.length - student.prompt, _STREAM)
    index_BS = torch.where(response_BS & (student.chunk >= 0), student.chunk, chunks).long()
    first_BC = _first_tokens(index_BS, chunks)
    anchor_BS = _anchors(index_BS, first_BC)
    assert block or not sampling.per_block, "one timestep per block needs the block size"
    levels = Levels.of(response_BS, anchor_BS, student.prompt, student.length, block if sampling.per_block else length)
    uniform_N = levels.uniforms(sampling, draws[:, 0], strata, seed, epoch, batch.keys)
    t_N = uniform_N if sampling.exact else schedule.draw(uniform_N)
    t_N = t_N if t is None else _given(t, levels, sampling)
    units_BS = masking.units(response_BS, anchor_BS) if sampling.exact else None
    rates = schedule.rate(t_N), schedule.inverse_weight(t_N)
    drawn_BS, rate_N, inverse_weight_N = _drawn(*rates, _of_tokens(draws, student), response_BS, units_BS, levels)
    chunk_masked_BC = masking.chunks(drawn_BS, index_BS, first_BC)
    if in_order := sampling.own_order and batch.order is not None:
        unknown_BS, ordered_B1 = _unknown(batch, response_BS, block, levels, uniform_N)
        drawn_BS = torch.where(ordered_B1, unknown_BS, drawn_BS)
        chunk_masked_BC = torch.where(ordered_B1, EXPAND.chunks(drawn_BS, index_BS, first_BC), chunk_masked_BC)
    with_none_BC1 = torch.cat([chunk_masked_BC, torch.zeros(len(batch), 1, dtype=torch.bool)], 1)
    student_masked_BS = torch.where(index_BS < chunks, with_none_BC1.gather(1, index_BS), drawn_BS)
    if in_order:
        share_N, ordered_N = share_masked(student_masked_BS, response_BS, levels), ordered_B1[levels.sample_N, 0]
        rate_N, inverse_weight_N = (torch.where(ordered_N, share_N, value) for value in (rate_N, inverse_weight_N))
    return Noise(
        rate=rate_N,
        inverse_weight=inverse_weight_N,
        level_sample=levels.sample_N,
        student_level=levels.level_BS,
        chunk_level=_at_first(levels.level_BS, first_BC),
        student_masked=student_masked_BS,
        teacher_masked=None if batch.teacher is None else _follow(batch.teacher, with_none_BC1),
        chunk_masked=chunk_masked_BC,
        seed=seed,
        epoch=epoch,
    )


def _unknown(
    batch: Batch, response_BS: torch.Tensor, block: int, levels: Levels, uniform_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder had not decided, bool [B, S], and which samples have an order, bool [B, 1]."""
    order_BS, first_B = batch.order, batch.student.prompt // block
    assert order_BS is not None
    return undecided(order_BS, response_BS, first_B, block, levels, uniform_N), (order_BS > 0).any(1, keepdim=True)


def _of_tokens(draws: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """[B, S]: the random number of each response token. The first one is for the timestep; prompts need none."""
    place_BS = 1 + torch.arange(tokens.ids.shape[1]) - tokens.prompt[:, None]
    return draws.gather(1, place_BS.clamp(0, draws.shape[1] - 1))


def _drawn(
    rate_N: torch.Tensor,
    inverse_weight_N: torch.Tensor,
    draws_BS: torch.Tensor,
    response_BS: torch.Tensor,
    units_BS: torch.Tensor | None,
    levels: Levels,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sampled tokens, rates and inverse weights; ``units_BS``: those of which an exact number is drawn."""
    if units_BS is None:
        return response_BS & (draws_BS < rate_N[levels.level_BS]), rate_N, inverse_weight_N
    drawn_BS, share_N = _exact(rate_N, draws_BS, units_BS, levels.level_BS)
    return drawn_BS, share_N, share_N * (inverse_weight_N / rate_N)


def _exact(
    rate_N: torch.Tensor, draws_BS: torch.Tensor, units_BS: torch.Tensor, level_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(drawn bool [B, S], k / n [N]): of each level's n units, the k with the smallest random numbers.

    k = 1 + floor(rate(t) n), at most n, with t uniform on (0, 1]; a schedule's eps has no effect, because no k is 0.
    The bound is the same for every schedule: one that is not linear draws some k more often than others, and the weight
    n / k times d rate / dt makes up for that, as everywhere (MDLM eq. 10). It is n / k for the linear one.
    """
    level_U = level_BS[units_BS]
    units_N = torch.bincount(level_U, minlength=len(rate_N))
    count_N = (1 + (rate_N * units_N).floor()).clamp(max=units_N)
    drawn_BS = torch.zeros_like(units_BS)
    drawn_BS[units_BS] = rank_within(level_U, draws_BS[units_BS]) < count_N[level_U]
    return drawn_BS, count_N / units_N


def response(tokens: Tokens) -> torch.Tensor:
    """bool [B, S]: the maskable positions, from the end of the prompt to the sample's length."""
    position_S = torch.arange(tokens.ids.shape[1])
    return (position_S >= tokens.prompt[:, None]) & (position_S < tokens.length[:, None])


def _given(t: torch.Tensor | np.ndarray, levels: Levels, sampling: NoiseSampling) -> torch.Tensor:
    """Timesteps [N] from those of each sample [B], or of the blocks of each sample [B, J]."""
    given, blocks_B = torch.as_tensor(t, dtype=torch.float64), levels.blocks_B
    wanted = [len(blocks_B), int(blocks_B.max())] if sampling.per_block else [len(blocks_B)]
    if list(given.shape) != wanted:
        raise ValueError(f"timesteps of shape {list(given.shape)}, not {wanted}: pass one per sample, or per block")
    t_N = given[levels.sample_N, levels.block_N] if sampling.per_block else given[levels.sample_N]
    if not bool(((t_N > 0) & (t_N <= 1)).all()):
        raise ValueError("timesteps must be in (0, 1]: 0 masks nothing and has an infinite loss weight")
    return t_N


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


def _anchors(index_BS: torch.Tensor, first_BC: torch.Tensor) -> torch.Tensor:
    """int64 [B, S]: the first token of each token's chunk; the token itself where it is in none."""
    place_S = torch.arange(index_BS.shape[1])
    first_BC1 = torch.nn.functional.pad(first_BC, (0, 1))
    return torch.where(index_BS < first_BC.shape[1], first_BC1.gather(1, index_BS), place_S)


def _at_first(values_BS: torch.Tensor, first_BC: torch.Tensor) -> torch.Tensor:
    """[B, C]: the value of each chunk's first token; 0 for a chunk the sample does not have."""
    return torch.nn.functional.pad(values_BS, (0, 1)).gather(1, first_BC)
