"""What stands in for a GPU: tensors without values, on which an operation that would wait for the device raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "unique_dim", "unique_consecutive", "_unique2")


def without_values(tensor: torch.Tensor, mode: FakeTensorMode, device: str) -> torch.Tensor:
    """A tensor of the same shape and kind on ``device``, without memory."""
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def model_without_values(model: nn.Module, mode: FakeTensorMode, device: str, trained: bool) -> nn.Module:
    """``model`` itself, with all its weights and buffers replaced."""
    made: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                new = made.setdefault(id(weight), nn.Parameter(without_values(weight, mode, device), trained))
                made[id(new)] = module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = without_values(buffer, mode, device)
    return model


def without_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tensors without values be "on cuda" where torch has no CUDA build, which some of Python's operators ask for.

    Only in ``torch.inference_mode()``: gradients of such tensors end the process.
    """
    get, put, copy = torch.Tensor.__getitem__, torch.Tensor.__setitem__, torch.Tensor.copy_
    contiguous = torch.Tensor.contiguous

    def indexing(tensor: torch.Tensor, index: Any) -> torch.Tensor:
        return _indexed(tensor, index) if tensor.is_cuda else get(tensor, index)

    def setting(tensor: torch.Tensor, index: Any, value: Any) -> None:
        _indexed(tensor, index).copy_(value) if tensor.is_cuda else put(tensor, index, value)

    def copying(tensor: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.copy_(tensor, value) if tensor.is_cuda else copy(tensor, value)

    def making_contiguous(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone(memory_format=torch.contiguous_format) if tensor.is_cuda else contiguous(tensor)

    monkeypatch.setattr(torch.Tensor, "copy_", copying)
    monkeypatch.setattr(torch.Tensor, "contiguous", making_contiguous)
    monkeypatch.setattr(torch.Tensor, "__getitem__", indexing)
    monkeypatch.setattr(torch.Tensor, "__setitem__", setting)
    monkeypatch.setattr(torch.Tensor, "__invert__", lambda mask: mask.eq(False))


def _indexed(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """``tensor[index]`` by the operators below it."""
    aten, parts = torch.ops.aten, index if isinstance(index, tuple) else (index,)
    result, dim, places = tensor, 0, [None] * (tensor.dim() + len(parts))
    for number, part in enumerate(parts):
        if part is Ellipsis:
            dim = result.dim() - sum(later is not None for later in parts[number + 1 :])
        elif part is None:
            result, dim = aten.unsqueeze(result, dim), dim + 1
        elif isinstance(part, int):
            result = aten.select(result, dim, part)
        elif isinstance(part, slice):
            result, dim = aten.slice(result, dim, part.start, part.stop, part.step or 1), dim + 1
        else:
            places[dim], dim = part, dim + 1
    return aten.index(result, places[: result.dim()]) if any(place is not None for place in places) else result


class Waits(TorchDispatchMode):
    """Counts the operations that would make the host wait for a device: ``with Waits() as waits: ...; waits.names``."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or by_mask:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
