"""Who attends to whom, as three small arrays a sample and one rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megatron_tide.diffusion.movable import Movable


@dataclass(frozen=True)
class Pattern(Movable):
    """Attention of a batch of N sequences of length L.

    block int32 [N, L]: the block of each position. noised bool [N, L]: True in the xt copy of [xt ; x0], False in x0
    and wherever there is one copy only. valid bool [N, L]: False for padding. A noised query sees its own noised block
    and the clean blocks before it; a clean query sees the clean blocks up to its own. Nobody sees padding, except that
    a padding position sees itself, so that no softmax is over nothing.
    """

    block: torch.Tensor
    noised: torch.Tensor
    valid: torch.Tensor

    def dense(self) -> torch.Tensor:
        """bool [N, 1, L, L], True = attend, for scaled_dot_product_attention."""
        itself = torch.eye(self.block.shape[1], dtype=torch.bool, device=self.block.device)
        rule = _rule(self.block[:, :, None], self.noised[:, :, None], self.block[:, None], self.noised[:, None])
        valid_q, valid_k = self.valid[:, :, None], self.valid[:, None]
        return (valid_q & valid_k & rule | ~valid_q & itself)[:, None]

    def flex(self) -> BlockMask:
        """The same rule for flex_attention, on the pattern's device; equal for every head."""
        block, noised, valid = self.block, self.noised, self.valid

        def attends(n: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            rule = _rule(block[n, q], noised[n, q], block[n, k], noised[n, k])
            return valid[n, q] & valid[n, k] & rule | ~valid[n, q] & (q == k)

        samples, length = block.shape
        return create_block_mask(attends, samples, None, length, length, device=block.device)


def staircase_mask(length: int, block_size: int) -> torch.Tensor:
    """The student's attention over [xt ; x0]: bool [2 length, 2 length], True = attend, query in rows.

    Block-diagonal inside xt, xt block i sees x0 blocks before i, x0 block i sees x0 blocks up to i (TIDE, BD3LM).
    Raises ValueError for a negative length or a block size below 1.
    """
    if length < 0 or block_size < 1:
        raise ValueError(f"staircase of length {length} in blocks of {block_size}: give a length >= 0, blocks >= 1")
    block = (torch.arange(length) // block_size).repeat(2)[None]
    noised = torch.arange(2 * length)[None] < length
    return Pattern(block, noised, torch.ones_like(noised)).dense()[0, 0]


def _rule(block_q: torch.Tensor, noised_q: torch.Tensor, block_k: torch.Tensor, noised_k: torch.Tensor) -> torch.Tensor:
    from_noised = noised_k & (block_q == block_k) | ~noised_k & (block_k < block_q)
    from_clean = ~noised_k & (block_k <= block_q)
    return noised_q & from_noised | ~noised_q & from_clean
