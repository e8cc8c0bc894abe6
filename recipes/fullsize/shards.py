"""A checkpoint in hub format of which only one shard exists at a time: made when it is asked for, removed once read.

The teacher's 32.5 GB would otherwise lie on disk twice, as a checkpoint and where its host keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_tide.models.checkpoint_keys import checkpoint_table
from megatron_tide.models.layer_specs import LayerSpec, LayerSpecs
from megatron_tide.models.shards import ShardedFolder

SPREAD = 0.02  # of random weights


class MadeShards(ShardedFolder):
    """Random weights from ``seed``, one shard a section; ``seconds`` and ``bytes`` tell what making them took."""

    def __init__(self, folder: Path, specs: LayerSpecs, dtype: torch.dtype, seed: int) -> None:
        self.family, self.seed, self.dtype = specs.family, seed, dtype
        self.seconds, self.bytes = 0.0, 0
        every = [specs.embedding, *specs.layers, specs.norm, specs.output]
        names = [f"model-{place:05d}-of-{len(every):05d}.safetensors" for place in range(1, len(every) + 1)]
        self._section_of: dict[str, LayerSpec] = dict(zip(names, every))
        super().__init__(folder)

    def _find(self) -> dict[str, str]:
        return {key: file for file, section in self._section_of.items() for key in self._table(section)}

    def _table(self, section: LayerSpec) -> dict[str, Tensor]:
        metas = {section.names[name]: meta for name, meta in section.tensors.items()}
        return {key: slot.of(metas) for key, slot in checkpoint_table(metas, self.family).items()}

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        wanted = set(keys)
        for file, section in self._section_of.items():
            here = [key for key in self._table(section) if key in wanted]
            if here:
                self._make(self.folder / file, section)
                yield from super().tensors(here)
                (self.folder / file).unlink()

    def _make(self, path: Path, section: LayerSpec) -> None:
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed + list(self._section_of).index(path.name))
        made = {key: self._random(key, meta, generator) for key, meta in self._table(section).items()}
        save_file(made, path, metadata={"format": "pt"})
        self.bytes += path.stat().st_size
        self.seconds += time.perf_counter() - started

    def _random(self, key: str, meta: Tensor, generator: torch.Generator) -> Tensor:
        if self.family.keeps_precision(key):
            return torch.zeros(meta.shape)
        if meta.dim() == 1:
            return torch.ones(meta.shape, dtype=self.dtype)
        return torch.empty(meta.shape, dtype=self.dtype).normal_(0.0, SPREAD, generator=generator)
