"""Questions and answers as flat tensors: what ranks send one another, of sizes that both ends know.

Shapes: N sequences, L positions, R scored rows, P pairs, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tide.diffusion import BlockDiffusionMask, ModelInput
from megatron_tide.hosting.state import ForwardState, TeacherInputs


@dataclass(frozen=True)
class Sizes:
    """How large one micro-batch's question is."""

    sequences: int
    length: int
    rows: int
    pairs: int

    @classmethod
    def of(cls, inputs: TeacherInputs) -> Sizes:
        sequences, length = inputs.input.input_ids.shape
        return cls(sequences, length, len(inputs.gold), len(inputs.pair_row))

    @property
    def parts(self) -> list[int]:
        """Numbers in each part of a packed question: ids, positions, pattern (3), rows, gold, pairs."""
        return [self.sequences * self.length] * 5 + [self.rows] * 2 + [self.pairs]

    @property
    def packed(self) -> int:
        """Numbers in a packed question."""
        return sum(self.parts)

    def output_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of a packed answer with ``hidden`` numbers of ``dtype`` a pair."""
        return 4 * self.rows + self.pairs * hidden * dtype.itemsize


def pack(inputs: TeacherInputs) -> Tensor:
    """int64 [Sizes.packed]."""
    asked, attention = inputs.input, inputs.input.attention
    parts = (
        asked.input_ids,
        asked.position_ids,
        attention.block,
        attention.noised,
        attention.valid,
        asked.rows,
        inputs.gold,
        inputs.pair_row,
    )
    return torch.cat([part.flatten().to(torch.int64) for part in parts])


def unpack(packed: Tensor, sizes: Sizes) -> TeacherInputs:
    """The question that :func:`pack` made a tensor of."""
    ids, positions, block, noised, valid, rows, gold, pair_row = packed.split(sizes.parts)
    shape = sizes.sequences, sizes.length
    attention = BlockDiffusionMask(block.view(shape).int(), noised.view(shape).bool(), valid.view(shape).bool())
    return TeacherInputs(ModelInput(ids.view(shape), positions.view(shape), attention, rows), gold, pair_row)


def pack_outputs(states: Sequence[ForwardState], with_hidden: bool, device: torch.device) -> Tensor:
    """uint8: of each passage its gold log-probs (fp32) and, if asked, the hidden rows of its pairs."""
    parts = [torch.empty(0, dtype=torch.uint8, device=device)]
    for state in states:
        parts.append(state.target_logprobs.float().view(torch.uint8))
        if with_hidden:
            parts.append(state.pair_hidden.flatten().view(torch.uint8))
    return torch.cat(parts)


def unpack_outputs(packed: Tensor, states: Sequence[ForwardState], hidden: int, dtype: torch.dtype) -> None:
    """Put what :func:`pack_outputs` packed for these passages' questions into them."""
    start = 0

    def take(size: int, kind: torch.dtype) -> Tensor:
        nonlocal start
        piece = packed[start : start + size * kind.itemsize].clone()  # at the start of memory: aligned for its type
        start += len(piece)
        return piece.view(kind)

    for state in states:
        inputs = state.inputs
        state.target_logprobs = take(len(inputs.gold), torch.float32)
        state.pair_hidden = take(len(inputs.pair_row) * hidden, dtype).view(-1, max(hidden, 1))
