"""The sweep: a teacher's units in order, each over a whole accumulation window before the next one is needed.

    embedding -> layer 0 -> layer 1 -> ... -> head          (layer-major: a layer's weights are fetched once a step)

Whatever the accumulation, and with or without CompDemo, each unit is called exactly once a sweep, so the traffic of a
sharded or offloaded teacher is its own bytes, once per optimizer step, and the number of collectives is fixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tide.hosting.passage import Passage
from megatron_tide.hosting.units import Embedding, Head, Layers, Unit
from megatron_tide.models.sections import Sections


class Sweep(nn.Module):
    """All units of a teacher. Called with passages, it answers them in place."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    @torch.no_grad()
    def forward(self, passages: list[Passage]) -> None:
        for unit in self.units:
            unit(passages)


def make_units(sections: Sections, dtype: torch.dtype, *, output: Tensor | None, gold: bool) -> list[Unit]:
    """One unit a section, empty. ``output``: the output embedding, if held elsewhere; ``gold``: score gold tokens."""
    layers = [Layers(sections, number, 1, dtype) for number in range(len(sections.layers))]
    return [Embedding(sections, [sections.embedding], dtype), *layers, Head(sections, dtype, output, gold)]
