"""The teacher as a full copy on each rank. On a GPU it takes a step's micro-batches layer by layer, as sharded ones do.

An expert then has that many more rows per read of its weights. On a CPU one micro-batch goes through all layers before
the next: masks and hidden states exist for one only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_tide.diffusion import DistillBatch
from megatron_tide.fast import is_on
from megatron_tide.hosting.backend import Ranks, TeacherBackend
from megatron_tide.hosting.layerwise import ForwardState, TeacherInputs, outputs_of, run_together
from megatron_tide.models import load_model
from megatron_tide.models.families import family_of
from megatron_tide.models.layer_specs import JointLayer
from megatron_tide.objectives import Strategy, TeacherOutputs


class ReplicatedTeacher(TeacherBackend):
    """``model``: a complete teacher in memory. ``at_once``: micro-batches per sweep; None: all of a call."""

    def __init__(self, model: Any, strategy: Strategy) -> None:
        self.model, self.strategy = model.eval().requires_grad_(False), strategy
        layout = family_of(model).layout
        self.embedding, self.rotary, self.norm = (
            model.get_submodule(path) for path in (layout.embedding, layout.rotary, layout.norm)
        )
        self.layers = [JointLayer(layer, layout.joint_mlp) for layer in model.get_submodule(layout.layers)]
        self.at_once = None if model.head_weight.is_cuda and is_on("layerwise") else 1

    @classmethod
    def open(
        cls, folder: str, settings: dict[str, Any], dtype: torch.dtype, strategy: Strategy, ranks: Ranks
    ) -> ReplicatedTeacher:
        return cls(load_model(folder, dtype, device=str(ranks.device)), strategy)

    @torch.no_grad()
    def score(self, microbatches: Sequence[DistillBatch]) -> list[TeacherOutputs]:
        found: list[TeacherOutputs] = []
        size = self.at_once or max(1, len(microbatches))
        for first in range(0, len(microbatches), size):
            states = [ForwardState(TeacherInputs.of(batch)) for batch in microbatches[first : first + size]]
            self._sweep(states)
            found += outputs_of(states, self.strategy, self.model.head_weight)
        return found

    def _sweep(self, states: Sequence[ForwardState]) -> None:
        for state in states:
            hidden = self.embedding(state.inputs.input.input_ids)
            state.start(hidden, *self.rotary(hidden, state.inputs.input.position_ids))
        for layer in self.layers:
            run_together(states, layer)
        for state in states:
            state.score(self.norm(state.rows()), self.model.head_weight, self.strategy.needs_target_logprobs)
