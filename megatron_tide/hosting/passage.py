"""One micro-batch's way through a teacher: what is asked, what is under way, what is answered.

Shapes: N sequences (both CompDemo halves together), L positions, R scored rows, P one-to-one chunks, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tide.diffusion import ModelInput, Noised
from megatron_tide.diffusion.movable import Movable

if TYPE_CHECKING:
    from megatron_tide.models.a2d_qwen3 import Mask


@dataclass(frozen=True)
class Question(Movable):
    """What a teacher is asked about one micro-batch: its input, the gold token of each row [R], the paired rows [P]."""

    input: ModelInput
    gold: Tensor
    pair_row: Tensor

    @classmethod
    def of(cls, noised: Noised) -> Question:
        assert noised.teacher is not None
        return cls(noised.teacher, noised.teacher_gold, noised.pair_teacher_row)


class Passage:
    """A question with its hidden states. Sections change it in place, so that no two copies are alive."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.hidden = torch.empty(0)
        self.cos = self.sin = torch.empty(0)
        self.mask: Mask | None = None
        self.gold_logp = torch.empty(0)
        self.pair_hidden = torch.empty(0)

    def start(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Embedded: hidden [N, L, H]; rotations and mask serve all layers."""
        from megatron_tide.models.a2d_qwen3 import attention_mask_for

        pattern = self.question.input.pattern
        mask = pattern.flex() if hidden.is_cuda else pattern.dense()
        self.hidden, self.cos, self.sin = hidden, cos, sin
        self.mask = attention_mask_for(mask, hidden.dtype)

    def rows(self) -> Tensor:
        """The rows asked for, [R, H], not yet normed."""
        return self.hidden.flatten(0, 1).index_select(0, self.question.input.rows)

    def finish(self, gold_logp: Tensor, rows_RH: Tensor) -> None:
        """Answered: [R] and, of the normed rows, the paired ones [P, H]; what was under way is let go."""
        self.gold_logp = gold_logp
        self.pair_hidden = rows_RH.index_select(0, self.question.pair_row)
        self.hidden = self.cos = self.sin = torch.empty(0)
        self.mask = None
