"""A teacher as flat layers, run layer by layer over all micro-batches of an optimizer step.

    embedding -> layer 0 -> layer 1 -> ... -> head          each is fetched once per step, and serves every micro-batch

The weights of a layer are in ONE flat tensor: one gather, one file on disk, one buffer. Sharding, streaming and
pipelining do not depend on its content. For any accumulation, with or without CompDemo, each layer is called exactly
once per sweep: a sharded or offloaded teacher transfers each weight once, and the number of collectives is fixed.

Shapes: N sequences (both CompDemo halves together), L positions, R target positions, P one-to-one chunks ("pairs"), H
hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tide.diffusion import DistillBatch, ModelInput
from megatron_tide.diffusion.attention import TILE
from megatron_tide.fast import piece_sizes
from megatron_tide.hosting.backend import Ranks, TeacherBackend
from megatron_tide.models import resolve_folder, target_logprobs
from megatron_tide.models.backbone_a2d import Mask, attention_mask_for
from megatron_tide.models.checkpoint_keys import checkpoint_table
from megatron_tide.models.layer_specs import Flow, LayerSpec, LayerSpecs, layer_specs_of
from megatron_tide.models.load import checked_table
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Strategy, TeacherOutputs

ALIGNMENT = 128  # bytes: every tensor is aligned for the fastest kernels


@dataclass(frozen=True)
class TeacherInputs:
    """The teacher's inputs of one micro-batch: model input, target token of each row [R], rows of the pairs [P]."""

    input: ModelInput
    targets: Tensor
    pair_index: Tensor

    @classmethod
    def of(cls, batch: DistillBatch) -> TeacherInputs:
        assert batch.teacher is not None
        given = batch.teacher.padded(TILE) if batch.teacher.input_ids.is_cuda else batch.teacher
        return cls(given, batch.teacher_targets, batch.pair_teacher_index)


class ForwardState:
    """One micro-batch on its way through the layers, which change it in place: no two copies of hidden states exist."""

    def __init__(self, inputs: TeacherInputs) -> None:
        self.inputs = inputs
        self.hidden = self.cos = self.sin = torch.empty(0)
        self.mask: Mask | None = None
        self.target_logprobs = torch.empty(0)
        self.pair_hidden = torch.empty(0)

    def start(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> None:
        """After the embedding: hidden [N, L, H]; rotations and mask serve all layers."""
        attention = self.inputs.input.attention
        mask = attention.flex() if hidden.is_cuda else attention.dense()
        self.hidden, self.cos, self.sin = hidden, cos, sin
        self.mask = attention_mask_for(mask, hidden.dtype)

    def rows(self) -> Tensor:
        """Hidden states of the target positions, [R, H], before the last norm."""
        return self.hidden.flatten(0, 1).index_select(0, self.inputs.input.rows)

    def score(self, hidden_RH: Tensor, head: Tensor, score_targets: bool) -> None:
        """After the last norm: keep the log-probs [R], if they are needed, and the hidden states of the pairs [P, H];
        free everything else.
        """
        targets = self.inputs.targets
        self.target_logprobs = torch.zeros_like(targets, dtype=torch.float32)
        if score_targets:
            self.target_logprobs = target_logprobs(hidden_RH, head, targets)
        self.pair_hidden = hidden_RH.index_select(0, self.inputs.pair_index)
        self.hidden = self.cos = self.sin = torch.empty(0)
        self.mask = None


class FlatLayer(nn.Module):
    """One layer (or several parts in a row) in a flat parameter ``flat`` [n], which is empty until :meth:`fill`.

    Tensors that keep their stored precision (a router's bias) are separate, in ``exact``: small, never
    sharded, and not cast with the module.
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
        """A part's tensors by its own names: views of ``flat``, on its current device."""
        found = {}
        for name, full_name in part.names.items():
            if full_name in self.exact:
                found[name] = self.exact[full_name]
            else:
                start, shape = self._start[full_name], self._shapes[full_name].shape
                found[name] = self.flat[start : start + shape.numel()].view(shape)
        return found

    def fill(self, source: ShardedFolder, device: torch.device, *, read: bool = True) -> None:
        """Load the weights of a checkpoint, straight to ``device``; ``read=False`` only allocates ``flat``.

        The checkpoint's tensors have the shapes that config.json gives them (:func:`open_layer_specs` checked it).
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
    """Tokens -> hidden states, rotations and mask of every micro-batch."""

    def __init__(self, specs: LayerSpecs, dtype: torch.dtype) -> None:
        super().__init__(specs, [specs.embedding], dtype)

    def forward(self, states: Sequence[ForwardState]) -> None:
        tensors = self.tensors(self.parts[0])
        for state in states:
            given = state.inputs.input
            state.start(*self.specs.run_embedding(tensors, given.input_ids, given.position_ids))


class FlatDecoderLayer(FlatLayer):
    """Decoder layer ``number``, over every micro-batch."""

    def __init__(self, specs: LayerSpecs, number: int, dtype: torch.dtype) -> None:
        super().__init__(specs, [specs.layers[number]], dtype)
        self.number = number

    def forward(self, states: Sequence[ForwardState]) -> None:
        tensors = self.tensors(self.parts[0])
        run_together(states, lambda flows: self.specs.run_layer(self.number, tensors, flows))


def run_together(states: Sequence[ForwardState], layer: Callable[[list[Flow]], list[Tensor]]) -> None:
    """Run a layer over all micro-batches, those together that its experts may take at once."""
    for group in _groups(states):
        flows = [(state.hidden, state.cos, state.sin, state.mask) for state in group]
        for state, hidden in zip(group, layer(flows)):
            state.hidden = hidden


def _groups(states: Sequence[ForwardState]) -> list[list[ForwardState]]:
    """Micro-batches that run through a layer together: at most as many tokens as :func:`piece_sizes` says, unless a
    single one has more.
    """
    groups: list[list[ForwardState]] = []
    tokens, most = 0, piece_sizes(states[0].hidden.device).tokens if states else 0
    for state in states:
        size = state.inputs.input.input_ids.numel()
        if not groups or tokens + size > most:
            groups.append([])
            tokens = 0
        groups[-1].append(state)
        tokens += size
    return groups


class FlatHead(FlatLayer):
    """Hidden states of the target positions -> the last norm -> target log-probs (if ``score_targets``), and the pairs.

    ``head_weight`` [V, H]: a head that is held elsewhere (then it is no part of this layer), or None.
    """

    def __init__(self, specs: LayerSpecs, dtype: torch.dtype, head_weight: Tensor | None, score_targets: bool) -> None:
        super().__init__(specs, [specs.norm] if head_weight is not None else [specs.norm, specs.output], dtype)
        self.head_weight = [head_weight]  # in a list: not a parameter of this layer
        self.score_targets = score_targets

    def forward(self, states: Sequence[ForwardState]) -> None:
        norm, (head,) = self.tensors(self.parts[0]), self.head_weight
        if head is None:
            head = self.tensors(self.parts[1])["weight"]
        for state in states:
            state.score(self.specs.run_norm(norm, state.rows()), head, self.score_targets)


class LayerwiseForward(nn.Module):
    """All layers of a teacher, in order. Each runs over all ``states`` before the next one is needed."""

    def __init__(self, flat_layers: Sequence[FlatLayer]) -> None:
        super().__init__()
        self.flat_layers = nn.ModuleList(flat_layers)

    @torch.no_grad()
    def forward(self, states: list[ForwardState]) -> None:
        for layer in self.flat_layers:
            layer(states)


def open_layer_specs(folder: str) -> tuple[LayerSpecs, ShardedFolder]:
    """A teacher's layers and its checkpoint, which holds exactly their tensors (else ValueError).

    Every rank checks all of it, headers only: a rank that found a mistake later would leave the others waiting.
    """
    path = resolve_folder(folder)
    specs, source = layer_specs_of(path), ShardedFolder(path)
    checked_table(source, specs.model)
    return specs, source


def make_flat_layers(
    specs: LayerSpecs, dtype: torch.dtype, *, head_weight: Tensor | None, score_targets: bool
) -> list[FlatLayer]:
    """Embedding, decoder layers and head, all empty; see :class:`FlatHead`."""
    decoder = [FlatDecoderLayer(specs, number, dtype) for number in range(len(specs.layers))]
    return [FlatEmbedding(specs, dtype), *decoder, FlatHead(specs, dtype, head_weight, score_targets)]


class LayerwiseTeacher(TeacherBackend):
    """What backends that run layer by layer share: the empty ``flat_layers``, and outputs from finished states.

    ``head_weight`` [V, H] is complete on every rank if the strategy needs hidden states: a distribution objective
    computes the teacher's logits from them, a few rows at a time, together with the student's.
    """

    @classmethod
    def open(cls, folder: str, *args: Any) -> LayerwiseTeacher:
        return cls(*open_layer_specs(folder), *args)

    def __init__(
        self,
        specs: LayerSpecs,
        source: ShardedFolder,
        settings: dict[str, Any],
        dtype: torch.dtype,
        strategy: Strategy,
        ranks: Ranks,
    ) -> None:
        self.specs, self.dtype, self.strategy, self.ranks = specs, dtype, strategy, ranks
        self.head_weight: Tensor | None = None
        if strategy.needs_hidden:
            head = FlatLayer(specs, [specs.output], dtype)
            head.fill(source, ranks.device)
            self.head_weight = head.tensors(specs.output)["weight"].detach()
        scored = strategy.needs_target_logprobs
        self.flat_layers = make_flat_layers(specs, dtype, head_weight=self.head_weight, score_targets=scored)
        self._load(source, settings)

    @abstractmethod
    def _load(self, source: ShardedFolder, settings: dict[str, Any]) -> None:
        """Fill this rank's part of ``flat_layers`` and build the DeepSpeed engine."""

    def _announce(self, layers: Sequence[FlatLayer]) -> Iterator[FlatLayer]:
        for number, layer in enumerate(layers, 1):
            size = f"{layer.flat_bytes / 1e9:.2f} GB"
            self.ranks.print_rank0(f"teacher: loading {layer.title} ({number} of {len(layers)}, {size})")
            yield layer


def outputs_of(states: Sequence[ForwardState], strategy: Strategy, head_weight: Tensor | None) -> list[TeacherOutputs]:
    """One per micro-batch, with the fields that the strategy needs."""
    return [
        TeacherOutputs(
            target_logprobs=state.target_logprobs if strategy.needs_target_logprobs else None,
            hidden=state.pair_hidden if strategy.needs_hidden else None,
            head_weight=head_weight if strategy.needs_hidden else None,
        )
        for state in states
    ]
