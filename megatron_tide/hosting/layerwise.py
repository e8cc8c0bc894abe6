"""The sweep: a teacher's units in order, each over a whole accumulation window before the next one is needed.

    embedding -> layer 0 -> layer 1 -> ... -> head          (layer-major: a layer's weights are fetched once a step)

Whatever the accumulation, and with or without CompDemo, each unit is called exactly once a sweep, so the traffic of a
sharded or offloaded teacher is its own bytes, once per optimizer step, and the number of collectives is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tide.hosting.flat_layers import FlatDecoderLayers, FlatEmbedding, FlatHead, FlatLayer
from megatron_tide.hosting.state import ForwardState
from megatron_tide.models.layer_specs import LayerSpecs


class LayerwiseForward(nn.Module):
    """All units of a teacher. Called with passages, it answers them in place."""

    def __init__(self, flat_layers: Sequence[FlatLayer]) -> None:
        super().__init__()
        self.flat_layers = nn.ModuleList(flat_layers)

    @torch.no_grad()
    def forward(self, states: list[ForwardState]) -> None:
        for flat_layer in self.flat_layers:
            flat_layer(states)


def make_flat_layers(specs: LayerSpecs, dtype: torch.dtype, *, output: Tensor | None, gold: bool) -> list[FlatLayer]:
    """One unit a section, empty. ``output``: the output embedding, if held elsewhere; ``gold``: score gold tokens."""
    layers = [FlatDecoderLayers(specs, number, 1, dtype) for number in range(len(specs.layers))]
    return [FlatEmbedding(specs, [specs.embedding], dtype), *layers, FlatHead(specs, dtype, output, gold)]
