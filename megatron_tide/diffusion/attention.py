"""Attention masks of block diffusion, as three small arrays per sample and one rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megatron_tide.diffusion.tensor_dataclass import TensorDataclass

TILE = 128  # positions of a tile of flex_attention; lengths that are multiples share one compiled graph


@dataclass(frozen=True)
class BlockDiffusionMask(TensorDataclass):
    """Attention of a batch of N sequences of length L.

    block int32 [N, L]: the block of each position, as any number that grows along the text; positions of a causal copy
    are blocks of one token. noised bool [N, L]: True in the xt copy of [xt ; x0], False in x0 and in layouts with one
    copy. valid bool [N, L]: False for padding. A noised query sees its own noised block and the clean blocks before it;
    a clean query sees the clean blocks up to its own. Padding is visible to only itself, so that no softmax is empty.
    """

    block: torch.Tensor
    noised: torch.Tensor
    valid: torch.Tensor

    def dense(self) -> torch.Tensor:
        """bool [N, 1, L, L], True = attend, for scaled_dot_product_attention."""
        own, clean, reach = self._codes()
        return (own[:, None, :, None] == own[:, None, None]).logical_or_(
            clean[:, None, None] <= reach[:, None, :, None]
        )

    def flex(self) -> BlockMask:
        """The same rule for flex_attention, on this mask's device; equal for all heads."""
        own, clean, reach = self._codes()

        def attends(n: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (own[n, q] == own[n, k]) | (clean[n, k] <= reach[n, q])

        samples, length = self.block.shape
        return create_block_mask(attends, samples, None, length, length, device=self.block.device)

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rule in two comparisons: q attends to k where own_q == own_k or clean_k <= reach_q; int32 [N, L] each.

        own: the block of a noised position, a unique number for all others (which always attend to themselves); clean:
        the block of a clean position; reach: the last clean block a position sees.
        """
        itself = -1 - torch.arange(self.block.shape[1], dtype=torch.int32, device=self.block.device)
        block = self.block.int()
        own = torch.where(self.noised & self.valid, block, itself)
        clean = block.masked_fill(self.noised | ~self.valid, torch.iinfo(torch.int32).max)
        reach = (block - self.noised.int()).masked_fill(~self.valid, -1)
        return own, clean, reach


def staircase_mask(length: int, block_size: int) -> torch.Tensor:
    """The student's attention over [xt ; x0]: bool [2 length, 2 length], True = attend, query in rows.

    Block-diagonal inside xt, xt block i sees x0 blocks before i, x0 block i sees x0 blocks up to i (TIDE, BD3LM).
    Raises ValueError for a negative length or a block size below 1.
    """
    if length < 0 or block_size < 1:
        raise ValueError(f"staircase of length {length} in blocks of {block_size}: length must be >= 0, blocks >= 1")
    block = (torch.arange(length) // block_size).repeat(2)[None]
    noised = torch.arange(2 * length)[None] < length
    return BlockDiffusionMask(block, noised, torch.ones_like(noised)).dense()[0, 0]
