"""CompDemo: two teacher passes, each with a complementary half of the masked tokens revealed (TIDE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_tide.diffusion.counter_rng import uniform_rows
from megatron_tide.diffusion.levels import rank_within

if TYPE_CHECKING:
    from megatron_tide.data.batch import Batch
    from megatron_tide.diffusion.masking import Noise

_STREAM = b"compdemo"


@dataclass(frozen=True)
class CompDemo:
    """Split the masked part M of each noise level into A and B; each half is scored with the other one revealed.

    ratio: share of A. exact: |A| = round(ratio * |M|), ties to even, instead of one coin flip per unit (published).
    A level is a sample, or a block where each block has its own timestep; teacher tokens have that of their chunk.
    by_token: the units are teacher tokens instead of chunks (where both tokenizers are the same, or halves may cut
    through chunks). Raises ValueError for a ratio outside [0, 1].
    """

    ratio: float = 0.5
    exact: bool = False
    by_token: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"compdemo ratio = {self.ratio}: the share of the first half must be in [0, 1]")

    def split(self, batch: Batch, noise: Noise, seed: int, epoch: int) -> torch.Tensor:
        """bool [B, T]: the teacher's tokens in A; those of B are the other masked tokens that belong to a chunk.

        Tokens of no chunk are in neither half: they are never scored and never revealed. The EOS that fill up the last
        block belong to the same unit as the first one, also by token: revealed separately, they would show where the
        response ends.
        """
        teacher = batch.teacher
        assert teacher is not None
        assert noise.teacher_masked is not None
        masked_BT = noise.teacher_masked & (teacher.chunk >= 0)
        unit_BT = self._units(batch)
        units_B = torch.where(masked_BT, unit_BT + 1, 0).amax(1)
        draws_BU = uniform_rows(seed, epoch, batch.keys, units_B, _STREAM)
        split_BU = torch.zeros(draws_BU.shape[0], draws_BU.shape[1] + 1, dtype=torch.bool)
        outside = draws_BU.shape[1]
        index_BT = torch.where(masked_BT, unit_BT, outside)
        masked_BU = split_BU.scatter(1, index_BT, True)[:, :outside]
        level_BC1 = torch.nn.functional.pad(noise.chunk_level, (0, 1))
        level_BT = level_BC1.gather(1, torch.where(masked_BT, teacher.chunk, level_BC1.shape[1] - 1).long())
        level_BU = torch.zeros(split_BU.shape, dtype=torch.int64).scatter(1, index_BT, level_BT)[:, :outside]
        split_BU[:, :outside] = masked_BU & self._first(draws_BU, masked_BU, level_BU)
        return split_BU.gather(1, index_BT)

    def _units(self, batch: Batch) -> torch.Tensor:
        """int64 [B, T]: the unit of each teacher token (its chunk, or its position in the response)."""
        teacher = batch.teacher
        assert teacher is not None
        if not self.by_token:
            return teacher.chunk.long()
        position_T = torch.arange(teacher.ids.shape[1])
        return position_T.minimum(teacher.content_end[:, None]) - teacher.prompt[:, None]

    def _first(self, draws_BU: torch.Tensor, masked_BU: torch.Tensor, level_BU: torch.Tensor) -> torch.Tensor:
        if not self.exact:
            return draws_BU < self.ratio
        # A is the units of each level with the smallest random numbers.
        level_M = level_BU[masked_BU]
        wanted_N = (self.ratio * torch.bincount(level_M).double()).round()
        first_BU = torch.zeros_like(masked_BU)
        first_BU[masked_BU] = rank_within(level_M, draws_BU[masked_BU]) < wanted_N[level_M]
        return first_BU
