"""Questions and answers as flat tensors: what ranks send one another, of sizes that both ends know.

Shapes: N sequences, L positions, R scored rows, P pairs, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tide.diffusion import ModelInput, Pattern
from megatron_tide.hosting.passage import Passage, Question


@dataclass(frozen=True)
class Sizes:
    """How large one micro-batch's question is."""

    sequences: int
    length: int
    rows: int
    pairs: int

    @classmethod
    def of(cls, question: Question) -> Sizes:
        sequences, length = question.input.input_ids.shape
        return cls(sequences, length, len(question.gold), len(question.pair_row))

    @property
    def parts(self) -> list[int]:
        """Numbers in each part of a packed question: ids, positions, pattern (3), rows, gold, pairs."""
        return [self.sequences * self.length] * 5 + [self.rows] * 2 + [self.pairs]

    @property
    def packed(self) -> int:
        """Numbers in a packed question."""
        return sum(self.parts)

    def answer_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of a packed answer with ``hidden`` numbers of ``dtype`` a pair."""
        return 4 * self.rows + self.pairs * hidden * dtype.itemsize


def pack(question: Question) -> Tensor:
    """int64 [Sizes.packed]."""
    asked, pattern = question.input, question.input.pattern
    parts = (
        asked.input_ids,
        asked.position_ids,
        pattern.block,
        pattern.noised,
        pattern.valid,
        asked.rows,
        question.gold,
        question.pair_row,
    )
    return torch.cat([part.flatten().to(torch.int64) for part in parts])


def unpack(packed: Tensor, sizes: Sizes) -> Question:
    """The question that :func:`pack` made a tensor of."""
    ids, positions, block, noised, valid, rows, gold, pair_row = packed.split(sizes.parts)
    shape = sizes.sequences, sizes.length
    pattern = Pattern(block.view(shape).int(), noised.view(shape).bool(), valid.view(shape).bool())
    return Question(ModelInput(ids.view(shape), positions.view(shape), pattern, rows), gold, pair_row)


def pack_answers(passages: Sequence[Passage], with_hidden: bool, device: torch.device) -> Tensor:
    """uint8: of each passage its gold log-probs (fp32) and, if asked, the hidden rows of its pairs."""
    parts = [torch.empty(0, dtype=torch.uint8, device=device)]
    for passage in passages:
        parts.append(passage.gold_logp.float().view(torch.uint8))
        if with_hidden:
            parts.append(passage.pair_hidden.flatten().view(torch.uint8))
    return torch.cat(parts)


def unpack_answers(packed: Tensor, passages: Sequence[Passage], hidden: int, dtype: torch.dtype) -> None:
    """Put what :func:`pack_answers` packed for these passages' questions into them."""
    start = 0

    def take(size: int, kind: torch.dtype) -> Tensor:
        nonlocal start
        piece = packed[start : start + size * kind.itemsize].clone()  # at the start of memory: aligned for its type
        start += len(piece)
        return piece.view(kind)

    for passage in passages:
        question = passage.question
        passage.gold_logp = take(len(question.gold), torch.float32)
        passage.pair_hidden = take(len(question.pair_row) * hidden, dtype).view(-1, max(hidden, 1))
