"""One micro-batch's way through a teacher: what is asked, what is under way, what is answered.

Shapes: N sequences (both CompDemo halves together), L positions, R scored rows, P one-to-one chunks, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_tide.diffusion import DistillBatch, ModelInput
from megatron_tide.diffusion.tensor_dataclass import TensorDataclass

if TYPE_CHECKING:
    from megatron_tide.models.a2d_qwen3 import Mask


@dataclass(frozen=True)
class TeacherInputs(TensorDataclass):
    """What a teacher is asked about one micro-batch: its input, the gold token of each row [R], the paired rows [P]."""

    input: ModelInput
    gold: Tensor
    pair_row: Tensor

    @classmethod
    def of(cls, batch: DistillBatch) -> TeacherInputs:
        assert batch.teacher is not None
        return cls(batch.teacher, batch.teacher_targets, batch.pair_teacher_index)


class ForwardState:
    """A question with its hidden states. Sections change it in place, so that no two copies are alive."""

    def __init__(self, inputs: TeacherInputs) -> None:
        self.inputs = inputs
        self.hidden = torch.empty(0)
        self.cos = self.sin = torch.empty(0)
        self.mask: Mask | None = None
        self.target_logprobs = torch.empty(0)
        self.pair_hidden = torch.empty(0)

    def start(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Embedded: hidden [N, L, H]; rotations and mask serve all layers."""
        from megatron_tide.models.a2d_qwen3 import attention_mask_for

        attention = self.inputs.input.attention
        mask = attention.flex() if hidden.is_cuda else attention.dense()
        self.hidden, self.cos, self.sin = hidden, cos, sin
        self.mask = attention_mask_for(mask, hidden.dtype)

    def rows(self) -> Tensor:
        """The rows asked for, [R, H], not yet normed."""
        return self.hidden.flatten(0, 1).index_select(0, self.inputs.input.rows)

    def finish(self, target_logprobs: Tensor, rows_RH: Tensor) -> None:
        """Answered: [R] and, of the normed rows, the paired ones [P, H]; what was under way is let go."""
        self.target_logprobs = target_logprobs
        self.pair_hidden = rows_RH.index_select(0, self.inputs.pair_row)
        self.hidden = self.cos = self.sin = torch.empty(0)
        self.mask = None
