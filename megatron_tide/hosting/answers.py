"""From passages to what an objective is given; and the output embedding, where an objective needs whole rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tide.hosting.passage import Passage
from megatron_tide.hosting.units import Unit
from megatron_tide.models.sections import Sections
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Strategy, TeacherAnswer


def resident_output(sections: Sections, source: ShardedFolder, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The output embedding [V, H], whole on this rank: distribution objectives make the teacher's logits from its
    hidden rows beside the student's, a few rows at a time.
    """
    unit = Unit(sections, [sections.output], dtype)
    unit.fill(source, device)
    return unit.tensors(sections.output)["weight"].detach()


def answers_of(passages: Sequence[Passage], strategy: Strategy, output: Tensor | None) -> list[TeacherAnswer]:
    """One answer a passage, with the fields that the strategy asks for."""
    return [
        TeacherAnswer(
            gold_logp=passage.gold_logp if strategy.needs_gold else None,
            hidden=passage.pair_hidden if strategy.needs_hidden else None,
            head_weight=output if strategy.needs_hidden else None,
        )
        for passage in passages
    ]
