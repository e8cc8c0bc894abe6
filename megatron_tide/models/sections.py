"""A model as sections (embedding, layers, head), each of which can be held, moved and called on its own.

What hosting needs of a teacher that is never whole in one place: which tensors a section consists of, and how to run it
from given tensors. The modules are on torch's meta device: shapes and arithmetic without memory.

Shapes: N batch, L length, H hidden size, M rows asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megatron_tide.models.a2d_qwen3 import Mask
from megatron_tide.models.families import ConfigSource, meta_model, read_config
from megatron_tide.models.llada2 import rotary
from megatron_tide.models.tables import module_tensors, tied_aliases

Tensors = Mapping[str, Tensor]


class Layout(Protocol):
    """Where a family's sections are (module paths), and how its layers are called."""

    embedding: str
    layers: str
    norm: str
    output: str

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for positions [N, L], of the type and device of ``like``."""
        ...

    def arguments(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None) -> dict[str, Any]:
        """What a layer's ``forward`` is called with."""
        ...


class _LLaDA2:
    embedding, layers, norm, output = "model.word_embeddings", "model.layers", "model.norm", "lm_head"

    def __init__(self, config: Any) -> None:
        self._size, self._theta = config.rotary_size, config.rope_theta

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(position_ids, self._size, self._theta, like.dtype)

    def arguments(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None) -> dict[str, Any]:
        return {"hidden": hidden, "cos": cos, "sin": sin, "mask": mask}


class _Qwen3:
    embedding, layers, norm, output = "model.embed_tokens", "model.layers", "model.norm", "lm_head"

    def __init__(self, config: Any) -> None:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        self._rotary = Qwen3RotaryEmbedding(config)

    def rotary(self, position_ids: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        self._rotary = self._rotary.to(like.device)
        return self._rotary(like, position_ids)

    def arguments(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None) -> dict[str, Any]:
        return {"hidden_states": hidden, "attention_mask": mask, "position_embeddings": (cos, sin)}


_LAYOUTS: dict[str, type] = {"a2d-qwen3": _Qwen3, "llada2_moe": _LLaDA2}


@dataclass(frozen=True)
class Section:
    """One part of a model: its ``tensors`` (own name -> meta tensor) and what they are called in the whole model."""

    title: str
    tensors: dict[str, Tensor]
    names: dict[str, str]


@dataclass(frozen=True)
class Sections:
    """A model in order: ``embedding``, ``layers``, ``norm`` and ``output`` (the two together are the head)."""

    config: Any
    model: nn.Module
    layout: Layout
    embedding: Section
    layers: tuple[Section, ...]
    norm: Section
    output: Section

    def run_embedding(self, tensors: Tensors, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> hidden [N, L, H], and the cosines and sines that every layer takes."""
        hidden = nn.functional.embedding(input_ids, tensors["weight"])
        return hidden, *self.layout.rotary(position_ids, hidden)

    def run_layer(
        self, number: int, tensors: Tensors, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Mask | None
    ) -> Tensor:
        """One layer: [N, L, H] -> [N, L, H]; ``mask`` as ``attention_mask_for`` returns it."""
        layer = self.model.get_submodule(f"{self.layout.layers}.{number}")
        return functional_call(layer, dict(tensors), (), self.layout.arguments(hidden, cos, sin, mask))

    def run_norm(self, tensors: Tensors, rows: Tensor) -> Tensor:
        """The last norm, [M, H] -> [M, H]."""
        return functional_call(self.model.get_submodule(self.layout.norm), dict(tensors), (rows,))


def sections_of(source: ConfigSource) -> Sections:
    """The sections of a hub-format folder's model, or of a ``config.json`` or its dict; nothing is allocated."""
    family, config = read_config(source)
    model = meta_model(source)
    layout: Layout = _LAYOUTS[family.model_type](config)
    every, tied = module_tensors(model), tied_aliases(model)

    def section(title: str, path: str) -> Section:
        state = model.get_submodule(path).state_dict(keep_vars=True)
        names = {name: tied.get(f"{path}.{name}", f"{path}.{name}") for name in state}
        return Section(title, {name: every[whole] for name, whole in names.items()}, names)

    count = len(model.get_submodule(layout.layers))  # type: ignore[arg-type]
    return Sections(
        config=config,
        model=model,
        layout=layout,
        embedding=section("embedding", layout.embedding),
        layers=tuple(section(f"layer {number}", f"{layout.layers}.{number}") for number in range(count)),
        norm=section("norm", layout.norm),
        output=section("output", layout.output),
    )


def section_bytes(section: Section, dtype: torch.dtype) -> int:
    """Bytes of a section held in ``dtype``."""
    return sum(tensor.numel() for tensor in section.tensors.values()) * dtype.itemsize
