"""Attention layouts: what a model attends to in a sample, and the model input for it.

Shapes: N sequences (the batch, or twice the batch under CompDemo), S positions of the tokens, L positions of the input,
M scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_tide.diffusion.attention import BlockDiffusionMask
from megatron_tide.diffusion.tensor_dataclass import TensorDataclass

if TYPE_CHECKING:
    from megatron_tide.data.batch import Tokens


@dataclass(frozen=True)
class ModelInput(TensorDataclass):
    """One forward: input_ids and position_ids int64 [N, L], the attention mask, and rows int64 [M].

    rows: indices into the flattened N * L positions whose predictions are scored, in order. There is no
    right shift: the output at a row predicts that row's token. Padding positions contain an arbitrary token id.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention: BlockDiffusionMask
    rows: Tensor


class AttentionLayout(Protocol):
    """Builds a model's input from noised tokens.

    The input for ``tokens`` with ``masked`` bool [N, S], scored at (sample, position), int64 [M] each;
    ``block`` is the model's block size, ``mask_id`` its mask token.
    """

    def __call__(
        self, tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int
    ) -> ModelInput:
        """Lay the tokens out."""
        ...


def full(tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int) -> ModelInput:
    """One noised copy, each position attends to all others (published, for the teacher); ``block`` has no effect."""
    return block_causal(tokens, masked, sample, position, block=tokens.ids.shape[1], mask_id=mask_id)


def block_causal(
    tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int
) -> ModelInput:
    """One noised copy, a block attends to itself and the (noised) blocks before it."""
    samples, length = tokens.ids.shape
    position_NL = torch.arange(length).expand(samples, length).contiguous()
    valid_NL = position_NL < tokens.length[:, None]
    attention = BlockDiffusionMask((position_NL // block).int(), torch.zeros_like(masked), valid_NL)
    return ModelInput(tokens.ids.masked_fill(masked, mask_id), position_NL, attention, sample * length + position)


def staircase(
    tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int
) -> ModelInput:
    """Two copies [xt ; x0]: a noised block attends to itself and the clean blocks before it.

    Each sample is packed to what its rows depend on: of xt the blocks from the first one that holds a response token,
    of x0 all blocks except the last, to which no xt block attends. Rows are in xt.
    """
    start_N = tokens.prompt // block * block
    noised_N = tokens.length - start_N
    clean_N = (tokens.length - 1) // block * block
    total_N = noised_N + clean_N
    longest = -(-int(total_N.max()) // block) * block  # full blocks: fewer different shapes
    place_L = torch.arange(longest)
    valid_NL = place_L < total_N[:, None]
    noised_NL = place_L < noised_N[:, None]
    source_NL = torch.where(noised_NL, place_L + start_N[:, None], place_L - noised_N[:, None]).where(valid_NL, 0)
    ids_NL = tokens.ids.gather(1, source_NL).masked_fill(noised_NL & masked.gather(1, source_NL), mask_id)
    attention = BlockDiffusionMask((source_NL // block).int(), noised_NL, valid_NL)
    return ModelInput(ids_NL, source_NL, attention, sample * longest + position - start_N[sample])
