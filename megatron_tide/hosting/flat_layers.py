"""Units: a teacher's sections, each with its weights in ONE flat tensor.

One tensor is one gather, one file on disk, one buffer: what shards, streams and counts a unit needs to know nothing of
what is inside. A unit is called with the whole accumulation window, so it serves every micro-batch while it is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_tide.hosting.state import ForwardState
from megatron_tide.models import target_logprobs
from megatron_tide.models.checkpoint_keys import checkpoint_table
from megatron_tide.models.layer_specs import LayerSpec, LayerSpecs
from megatron_tide.models.shards import ShardedFolder

ALIGNMENT = 128  # bytes: every tensor starts where the fastest kernels want it
TOKENS_AT_ONCE = 4096  # through a layer's experts: enough rows for each, and what they take in memory stays bounded


class FlatLayer(nn.Module):
    """One section (or several in a row) in a flat parameter ``flat`` [n], which is empty until :meth:`fill`.

    Tensors that keep the precision they are stored in (a router's bias) lie beside it, in ``exact``: small, always
    here, and out of reach of whoever casts a module.
    """

    def __init__(self, specs: LayerSpecs, parts: Sequence[LayerSpec], dtype: torch.dtype) -> None:
        super().__init__()
        self.specs, self.parts = specs, tuple(parts)
        self.title = " and ".join(part.title for part in parts)
        self.exact: dict[str, Tensor] = {}
        self._shapes = {part.names[name]: meta for part in parts for name, meta in part.tensors.items()}
        self._start: dict[str, int] = {}
        step, size = ALIGNMENT // dtype.itemsize, 0
        for name, meta in self._shapes.items():
            if specs.family.keeps_precision(name):
                self.exact[name] = meta
            else:
                self._start[name] = size
                size += math.ceil(meta.numel() / step) * step
        self.flat = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.flat_bytes = size * dtype.itemsize

    def tensors(self, part: LayerSpec) -> dict[str, Tensor]:
        """A section's tensors by its own names: views of the flat one, wherever that is now."""
        found = {}
        for name, whole in part.names.items():
            if whole in self.exact:
                found[name] = self.exact[whole]
            else:
                start, shape = self._start[whole], self._shapes[whole].shape
                found[name] = self.flat[start : start + shape.numel()].view(shape)
        return found

    def fill(self, source: ShardedFolder, device: torch.device, *, read: bool = True) -> None:
        """Take the weights in from a checkpoint, straight to ``device``; ``read=False`` only makes room for ``flat``.

        The checkpoint's tensors have the shapes that config.json gives them (``open_layer_specs`` saw to it).
        """
        flat = torch.zeros(self.flat.numel(), dtype=self.flat.dtype, device=device)
        table = checkpoint_table(self._shapes, self.specs.family)
        for key, stored in source.tensors(key for key, slot in table.items() if read or slot.name in self.exact):
            slot = table[key]
            assert stored.shape == slot.of(self._shapes).shape, key
            if slot.name in self.exact:
                self.exact[slot.name] = stored.to(device, copy=True)
                continue
            start = self._start[slot.name] + (slot.index or 0) * stored.numel()
            flat[start : start + stored.numel()].copy_(stored.flatten())
        self.flat = nn.Parameter(flat, requires_grad=False)


class FlatEmbedding(FlatLayer):
    """Tokens -> hidden states, rotations and mask of every passage."""

    def forward(self, states: Sequence[ForwardState]) -> None:
        tensors = self.tensors(self.parts[0])
        for state in states:
            asked = state.inputs
            state.start(*self.specs.run_embedding(tensors, asked.input.input_ids, asked.input.position_ids))


class FlatDecoderLayers(FlatLayer):
    """Consecutive decoder layers, ``first`` .. : each runs over every passage before the next one does."""

    def __init__(self, specs: LayerSpecs, first: int, count: int, dtype: torch.dtype) -> None:
        super().__init__(specs, specs.layers[first : first + count], dtype)
        self.first = first

    def forward(self, states: Sequence[ForwardState]) -> None:
        for number, part in enumerate(self.parts, self.first):
            tensors = self.tensors(part)
            for group in _groups(states):
                flows = [(state.hidden, state.cos, state.sin, state.mask) for state in group]
                for state, hidden in zip(group, self.specs.run_layer(number, tensors, flows)):
                    state.hidden = hidden


def _groups(states: Sequence[ForwardState]) -> list[list[ForwardState]]:
    """Passages that run through a layer together, of at most :data:`TOKENS_AT_ONCE` unless one alone has more."""
    groups: list[list[ForwardState]] = []
    tokens = 0
    for state in states:
        size = state.inputs.input.input_ids.numel()
        if not groups or tokens + size > TOKENS_AT_ONCE:
            groups.append([])
            tokens = 0
        groups[-1].append(state)
        tokens += size
    return groups


class FlatHead(FlatLayer):
    """The rows asked for, normed -> gold log-probs, if ``gold``, and the paired rows.

    ``output`` [V, H]: an output embedding held elsewhere (it is then no part of this unit), or None.
    """

    def __init__(self, specs: LayerSpecs, dtype: torch.dtype, output: Tensor | None, gold: bool) -> None:
        parts = (specs.norm,) if output is not None else (specs.norm, specs.output)
        super().__init__(specs, parts, dtype)
        self.output = [output]  # in a list: not a parameter of this unit
        self.gold = gold

    def forward(self, states: Sequence[ForwardState]) -> None:
        norm = self.tensors(self.parts[0])
        output = self.output[0] if self.output[0] is not None else self.tensors(self.parts[1])["weight"]
        for state in states:
            rows_RH = self.specs.run_norm(norm, state.rows())
            asked = state.inputs.gold
            targets_R = target_logprobs(rows_RH, output, asked) if self.gold else asked.new_zeros(asked.shape).float()
            state.finish(targets_R, rows_RH)
