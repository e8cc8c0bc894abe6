"""A model as sections (embedding, layers, head), each of which can be held, moved and called on its own.

What hosting needs of a teacher that is never whole in one place: which tensors a section consists of, and how to run it
from given tensors. The modules are on torch's meta device: shapes and arithmetic without memory.

Shapes: N batch, L length, H hidden size, M rows asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_tide.models.a2d_qwen3 import Mask
from megatron_tide.models.checkpoint_keys import module_tensors, tied_aliases
from megatron_tide.models.families import ConfigSource, meta_model, read_config
from megatron_tide.models.llada2 import rotary

Tensors = Mapping[str, Tensor]
Flow = tuple[Tensor, Tensor, Tensor, Mask | None]  # hidden [N, L, H], cos, sin, mask: of one micro-batch


class Layout(Protocol):
    """Where a family's sections are (module paths), and how its layers are called."""

    embedding: str
    layers: str
    norm: str
    output: str

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions [N, L], of the type and device of ``like``."""
        ...

    def run_layer(self, layer: nn.Module, tensors: Tensors, flows: Sequence[Flow]) -> list[Tensor]:
        """A layer with the weights ``tensors`` over several flows: their next hidden states."""
        ...


class _LLaDA2:
    embedding, layers, norm, output = "model.word_embeddings", "model.layers", "model.norm", "lm_head"

    def __init__(self, config: Any) -> None:
        self._size, self._theta = config.rotary_size, config.rope_theta

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(position_ids, self._size, self._theta, like.dtype)

    def run_layer(self, layer: nn.Module, tensors: Tensors, flows: Sequence[Flow]) -> list[Tensor]:
        named = {f"layer.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(_LayerOverBatches(layer), named, (flows,))


class _LayerOverBatches(nn.Module):
    """An LLaDA2 layer over several flows: attention in each, then all their tokens through the experts at once.

    An expert's weights are read once for all of them, and its matmul has that many more rows.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, flows: Sequence[Flow]) -> list[Tensor]:
        mixed = [self.layer.attention_block(*flow) for flow in flows]
        fed_TH = self.layer.mlp_block(torch.cat([hidden.flatten(0, 1) for hidden in mixed])[None])[0]
        parts = fed_TH.split([hidden.shape[:2].numel() for hidden in mixed])
        return [part.view_as(hidden) for part, hidden in zip(parts, mixed)]


class _Qwen3:
    embedding, layers, norm, output = "model.embed_tokens", "model.layers", "model.norm", "lm_head"

    def __init__(self, config: Any) -> None:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        self._rotary = Qwen3RotaryEmbedding(config)

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        self._rotary = self._rotary.to(like.device)
        return self._rotary(like, position_ids)

    def run_layer(self, layer: nn.Module, tensors: Tensors, flows: Sequence[Flow]) -> list[Tensor]:
        return [
            functional_call(
                layer,
                dict(tensors),
                (),
                {"hidden_states": hidden, "attention_mask": mask, "position_embeddings": (cos, sin)},
            )
            for hidden, cos, sin, mask in flows
        ]


_LAYOUTS: dict[str, type] = {"a2d-qwen3": _Qwen3, "llada2_moe": _LLaDA2}


@dataclass(frozen=True)
class LayerSpec:
    """One part of a model: its ``tensors`` (own name -> meta tensor) and what they are called in the whole model."""

    title: str
    tensors: dict[str, Tensor]
    names: dict[str, str]


@dataclass(frozen=True)
class LayerSpecs:
    """A model in order: ``embedding``, ``layers``, ``norm`` and ``output`` (the two together are the head)."""

    config: Any
    model: nn.Module
    layout: Layout
    embedding: LayerSpec
    layers: tuple[LayerSpec, ...]
    norm: LayerSpec
    output: LayerSpec

    def run_embedding(self, tensors: Tensors, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> hidden [N, L, H], and the cosines and sines that every layer takes."""
        hidden = nn.functional.embedding(input_ids, tensors["weight"])
        return hidden, *self.layout.rotary(position_ids, hidden)

    def run_layer(self, number: int, tensors: Tensors, flows: Sequence[Flow]) -> list[Tensor]:
        """One layer over several flows, whose masks ``attention_mask_for`` gave: the next hidden states of each."""
        return self.layout.run_layer(self.model.get_submodule(f"{self.layout.layers}.{number}"), tensors, flows)

    def run_norm(self, tensors: Tensors, rows: Tensor) -> Tensor:
        """The last norm, [M, H] -> [M, H]."""
        return functional_call(self.model.get_submodule(self.layout.norm), dict(tensors), (rows,))


def layer_specs_of(source: ConfigSource) -> LayerSpecs:
    """The sections of a hub-format folder's model, or of a ``config.json`` or its dict; nothing is allocated."""
    family, config = read_config(source)
    model = meta_model(source)
    layout: Layout = _LAYOUTS[family.model_type](config)
    every, tied = module_tensors(model), tied_aliases(model)

    def spec(title: str, path: str) -> LayerSpec:
        state = model.get_submodule(path).state_dict(keep_vars=True)
        names = {name: tied.get(f"{path}.{name}", f"{path}.{name}") for name in state}
        return LayerSpec(title, {name: every[whole] for name, whole in names.items()}, names)

    count = len(model.get_submodule(layout.layers))  # type: ignore[arg-type]
    return LayerSpecs(
        config=config,
        model=model,
        layout=layout,
        embedding=spec("embedding", layout.embedding),
        layers=tuple(spec(f"layer {number}", f"{layout.layers}.{number}") for number in range(count)),
        norm=spec("norm", layout.norm),
        output=spec("output", layout.output),
    )


def layer_bytes(spec: LayerSpec, dtype: torch.dtype) -> int:
    """Bytes of a section held in ``dtype``."""
    return sum(tensor.numel() for tensor in spec.tensors.values()) * dtype.itemsize
