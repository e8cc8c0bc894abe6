"""A model as its parts (embedding, layers, norm, output), each of which can be stored, moved and called separately.

Hosting needs this for a teacher that is never complete in one place: which tensors a part consists of, and how to run
it from given tensors. The modules are on torch's meta device: shapes and arithmetic without memory.

Shapes: N sequences, L length, H hidden size, M scored rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_tide.models.backbone_a2d import Mask
from megatron_tide.models.checkpoint_keys import module_tensors, tied_aliases
from megatron_tide.models.families import ConfigSource, Family, family_of, meta_model

Tensors = Mapping[str, Tensor]
Flow = tuple[Tensor, Tensor, Tensor, Mask | None]  # hidden [N, L, H], cos, sin, mask: of one micro-batch


@dataclass(frozen=True)
class LayerSpec:
    """One part of a model: its ``tensors`` (own name -> meta tensor) and their ``names`` in the complete model."""

    title: str
    tensors: dict[str, Tensor]
    names: dict[str, str]


@dataclass(frozen=True)
class LayerSpecs:
    """A model in order: ``embedding``, ``layers``, ``norm`` and ``output`` (the last two are the head).

    ``model`` has no memory; ``rotary``, its position embedding, has its values.
    """

    config: Any
    family: Family
    model: nn.Module
    rotary: nn.Module
    embedding: LayerSpec
    layers: tuple[LayerSpec, ...]
    norm: LayerSpec
    output: LayerSpec

    def run_embedding(self, tensors: Tensors, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> hidden [N, L, H], and the cosines and sines that every layer takes."""
        hidden = nn.functional.embedding(input_ids, tensors["weight"])
        return hidden, *self.rotations(hidden, position_ids)

    def rotations(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions [N, L], of the type and on the device of ``hidden``."""
        return self.rotary.to(hidden.device)(hidden, position_ids)

    def run_layer(self, number: int, tensors: Tensors, flows: Sequence[Flow]) -> list[Tensor]:
        """One layer over several micro-batches, with masks from ``attention_mask_for``: their next hidden states."""
        layout = self.family.layout
        layer = JointLayer(self.model.get_submodule(f"{layout.layers}.{number}"), layout.joint_mlp)
        return functional_call(layer, {f"layer.{name}": tensor for name, tensor in tensors.items()}, (flows,))

    def run_norm(self, tensors: Tensors, rows: Tensor) -> Tensor:
        """The last norm, [M, H] -> [M, H]."""
        return functional_call(self.model.get_submodule(self.family.layout.norm), dict(tensors), (rows,))


class JointLayer(nn.Module):
    """A decoder layer over several micro-batches: one after the other, or with one MLP call for all their tokens."""

    def __init__(self, layer: nn.Module, joint_mlp: bool) -> None:
        super().__init__()
        self.layer: Any = layer
        self.joint_mlp = joint_mlp

    def forward(self, flows: Sequence[Flow]) -> list[Tensor]:
        call = self.layer.attention_block if self.joint_mlp else self.layer
        hidden = [call(x, attention_mask=mask, position_embeddings=(cos, sin)) for x, cos, sin, mask in flows]
        if not self.joint_mlp:
            return hidden
        # An expert's weights are read once for all tokens, and its matmul has that many more rows.
        out_TH = self.layer.mlp_block(torch.cat([x.flatten(0, 1) for x in hidden])[None])[0]
        parts = out_TH.split([x.shape[:2].numel() for x in hidden])
        return [part.view_as(x) for part, x in zip(parts, hidden)]


def layer_specs_of(source: ConfigSource, *, as_student: bool = False) -> LayerSpecs:
    """The parts of a hub-format folder's model, or of a ``config.json`` or its dict; no weight is allocated."""
    model = meta_model(source, as_student=as_student)
    family = family_of(model)
    layout = family.layout
    every, tied = module_tensors(model), tied_aliases(model)

    def spec(title: str, path: str) -> LayerSpec:
        state = model.get_submodule(path).state_dict(keep_vars=True)
        names = {name: tied.get(f"{path}.{name}", f"{path}.{name}") for name in state}
        return LayerSpec(title, {name: every[full] for name, full in names.items()}, names)

    count = len(model.get_submodule(layout.layers))
    return LayerSpecs(
        config=model.config,
        family=family,
        model=model,
        rotary=type(model.get_submodule(layout.rotary))(model.config),
        embedding=spec("embedding", layout.embedding),
        layers=tuple(spec(f"layer {n}", f"{layout.layers}.{n}") for n in range(count)),
        norm=spec("norm", layout.norm),
        output=spec("output", layout.output),
    )
