"""Masks of the student's own text as its decoder had them: of every block, what was undecided before one of its passes.

Elsewhere masks are random; a decoder decides what it is surest of first. In data that say which pass decided each token
(``Batch.order``), a level, which is one block, takes a pass k, each of the block's with the same probability, and masks
the tokens that pass k and later ones decided. All blocks of [xt ; x0] have such a state at once: the blocks before one
are clean in x0, as they are when the decoder comes to it. Chunks stay whole: one with an undecided token is masked.

A chunk that crosses the end of a block goes with its tokens in the block that it begins in, as its level does.

Shapes: B samples, S student positions, N noise levels, R tokens that decide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tide.diffusion.levels import Levels


def undecided(
    order_BS: Tensor, response_BS: Tensor, first_B: Tensor, block: int, levels: Levels, uniform_N: Tensor
) -> Tensor:
    """bool [B, S]: the tokens that were undecided before pass k of their block.

    ``first_B``: the block in which each response begins; ``uniform_N`` in (0, 1]: of the n passes of a level, from its
    first to its last, k is the one before ceil(uniform n) of them, so that larger numbers mask more, as timesteps do.
    Without meaning for samples without an order.
    """
    block_S = torch.arange(order_BS.shape[1]) // block
    inside_BS = response_BS & (block_S - first_B[:, None] == levels.block_N[levels.level_BS])
    level_R, order_R = levels.level_BS[inside_BS], order_BS[inside_BS].long()
    last_N = torch.zeros(len(uniform_N), dtype=torch.int64).scatter_reduce(0, level_R, order_R, "amax")
    start_N = last_N.scatter_reduce(0, level_R, order_R, "amin")
    masked_N = (uniform_N * (last_N - start_N + 1)).ceil().clamp(min=1)
    return inside_BS & (order_BS > (last_N - masked_N)[levels.level_BS])


def share_masked(masked_BS: Tensor, response_BS: Tensor, levels: Levels) -> Tensor:
    """float64 [N]: how many of each level's tokens are masked, as a share; at least one is."""
    level_R = levels.level_BS[response_BS]
    masked_N = torch.zeros(len(levels.sample_N), dtype=torch.float64)
    masked_N.scatter_add_(0, level_R, masked_BS[response_BS].double())
    return masked_N / torch.bincount(level_R, minlength=len(masked_N))
