"""From passages to what an objective is given; and the output embedding, where an objective needs whole rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tide.hosting.flat_layers import FlatLayer
from megatron_tide.hosting.state import ForwardState
from megatron_tide.models.layer_specs import LayerSpecs
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Strategy, TeacherOutputs


def replicated_output(specs: LayerSpecs, source: ShardedFolder, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The output embedding [V, H], whole on this rank: distribution objectives make the teacher's logits from its
    hidden rows beside the student's, a few rows at a time.
    """
    flat_layer = FlatLayer(specs, [specs.output], dtype)
    flat_layer.fill(source, device)
    return flat_layer.tensors(specs.output)["weight"].detach()


def teacher_outputs(states: Sequence[ForwardState], strategy: Strategy, output: Tensor | None) -> list[TeacherOutputs]:
    """One answer a passage, with the fields that the strategy asks for."""
    return [
        TeacherOutputs(
            target_logprobs=state.target_logprobs if strategy.needs_target_logprobs else None,
            hidden=state.pair_hidden if strategy.needs_hidden else None,
            head_weight=output if strategy.needs_hidden else None,
        )
        for state in states
    ]
