"""Attention masks of block diffusion, as three small arrays per sample and one rule."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from megatron_tide.diffusion.tensor_dataclass import TensorDataclass

TILE = 128  # positions of a tile of flex_attention; lengths that are multiples share one compiled graph
NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class TileLists(TensorDataclass):
    """The tiles that flex_attention computes, int32, in the form and under the names of ``BlockMask``.

    Of each row of tiles: the number [N, 1, T] and the columns [N, 1, T, T] of those that it masks, and of the full
    ones, which need no mask; and the same of each column, for the backward pass.
    """

    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    q_num_blocks: torch.Tensor
    q_indices: torch.Tensor
    full_q_num_blocks: torch.Tensor
    full_q_indices: torch.Tensor


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
    tiles: TileLists | None = None

    def with_tiles(self) -> BlockDiffusionMask:
        """Itself with ``tiles``, which :meth:`flex` would otherwise make: on the host, in the loader's thread."""
        return replace(self, tiles=tile_lists(*self._codes()))

    def dense(self) -> torch.Tensor:
        """bool [N, 1, L, L], True = attend, for scaled_dot_product_attention."""
        own, clean, reach = self._codes()
        return (own[:, None, :, None] == own[:, None, None]).logical_or_(
            clean[:, None, None] <= reach[:, None, :, None]
        )

    def flex(self) -> BlockMask:
        """The same rule for flex_attention, on this mask's device, without waiting for it; equal for all heads."""
        own, clean, reach = self._codes()
        tiles = self.tiles or tile_lists(own, clean, reach)

        def attends(n: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return (own[n, q] == own[n, k]) | (clean[n, k] <= reach[n, q])

        length = self.block.shape[1]
        lists = {field.name: getattr(tiles, field.name) for field in fields(tiles)}
        return BlockMask(seq_lengths=(length, length), **lists, BLOCK_SIZE=(TILE, TILE), mask_mod=attends)

    def _codes(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rule in two comparisons: q attends to k where own_q == own_k or clean_k <= reach_q; int32 [N, L] each.

        own: the block of a noised position, a unique number for all others (which always attend to themselves); clean:
        the block of a clean position; reach: the last clean block a position sees.
        """
        itself = -1 - torch.arange(self.block.shape[1], dtype=torch.int32, device=self.block.device)
        block = self.block.int()
        own = torch.where(self.noised & self.valid, block, itself)
        clean = block.masked_fill(self.noised | ~self.valid, NEVER)
        reach = (block - self.noised.int()).masked_fill(~self.valid, -1)
        return own, clean, reach


def tile_lists(own: torch.Tensor, clean: torch.Tensor, reach: torch.Tensor) -> TileLists:
    """The tiles of a mask, from its codes [N, L] and without its [L, L] pairs: by the extremes of the codes in a tile.

    Exact where the blocks of the noised copy grow along the sequence, as in all layouts; otherwise a tile too many may
    be listed as masked, which costs time only.
    """
    more = -own.shape[1] % TILE  # padding that attends to nothing: a tile that it is in is never full
    own, clean, reach = (
        pad(code, (0, more), value=fill).unflatten(1, (-1, TILE))
        for code, fill in ((own, -1), (clean, NEVER), (reach, -1))
    )
    noised, given = own >= 0, clean < NEVER
    whole = (noised | given).all(-1)
    first_own, last_own = own.masked_fill(~noised, NEVER).amin(-1), own.masked_fill(~noised, -1).amax(-1)
    first_clean, last_clean = clean.amin(-1), clean.masked_fill(~given, -1).amax(-1)
    meets = (first_own[:, :, None] <= last_own[:, None]) & (first_own[:, None] <= last_own[:, :, None])
    sees = first_clean[:, None] <= reach.amax(-1)[:, :, None]
    itself = torch.eye(own.shape[1], dtype=torch.bool, device=own.device)
    # Full: every query reaches every clean key, and all noised keys and all queries are of one noised block.
    one_block = noised.all(-1) & (first_own == last_own)
    same = (
        one_block[:, :, None]
        & (first_own[:, :, None] == first_own[:, None])
        & (last_own[:, :, None] == last_own[:, None])
    )
    reached = last_clean[:, None] <= reach.amin(-1)[:, :, None]
    full = whole[:, :, None] & whole[:, None] & reached & (same | ~noised.any(-1)[:, None])
    partial = (meets | sees | itself) & ~full
    return TileLists(
        *_ordered(partial), *_ordered(full), *_ordered(partial.transpose(1, 2)), *_ordered(full.transpose(1, 2))
    )


def _ordered(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [N, T, T] -> how many of each row, int32 [N, 1, T], and which, in order, int32 [N, 1, T, T]."""
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None].contiguous(), order.int()[:, None].contiguous()


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
