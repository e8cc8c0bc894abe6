"""CompDemo: two teacher passes, each with a complementary half of the masked tokens revealed (TIDE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_tide.diffusion.counter_rng import uniform_rows

if TYPE_CHECKING:
    from megatron_tide.data.batch import Batch
    from megatron_tide.diffusion.masking import Noise

_STREAM = b"compdemo"


@dataclass(frozen=True)
class CompDemo:
    """Split the masked part M of each sample into A and B; each half is scored with the other one revealed.

    ratio: share of A. exact: |A| = round(ratio * |M|), ties to even, instead of one coin flip per unit (published).
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
        split_BU[:, :outside] = masked_BU & self._first(draws_BU, masked_BU)
        return split_BU.gather(1, index_BT)

    def _units(self, batch: Batch) -> torch.Tensor:
        """int64 [B, T]: the unit of each teacher token (its chunk, or its position in the response)."""
        teacher = batch.teacher
        assert teacher is not None
        if not self.by_token:
            return teacher.chunk.long()
        position_T = torch.arange(teacher.ids.shape[1])
        return position_T.minimum(teacher.content_end[:, None]) - teacher.prompt[:, None]

    def _first(self, draws_BU: torch.Tensor, masked_BU: torch.Tensor) -> torch.Tensor:
        if not self.exact:
            return draws_BU < self.ratio
        # A is the units with the smallest random numbers; argsort twice is each unit's rank among the masked ones.
        rank_BU = draws_BU.where(masked_BU, torch.inf).argsort(1).argsort(1)
        return rank_BU < (self.ratio * masked_BU.sum(1, keepdim=True).double()).round()
