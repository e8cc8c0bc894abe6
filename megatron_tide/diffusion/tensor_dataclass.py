"""Dataclasses whose tensors move between devices together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

Self = TypeVar("Self", bound="TensorDataclass")


class TensorDataclass:
    """Base of a dataclass whose tensors (and other TensorDataclasses) move together; other fields are copied as they
    are.
    """

    def to(self: Self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """A copy with its tensors on ``device``; ``non_blocking`` helps only after ``pin_memory``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self: Self) -> Self:
        """A copy in page-locked memory (a loader with ``pin_memory=True`` calls this); needs an accelerator."""
        return self._each(torch.Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of its tensors until what ``stream`` has been given so far is done."""

        def record(tensor: torch.Tensor) -> torch.Tensor:
            tensor.record_stream(stream)
            return tensor

        self._each(record)

    def _each(self: Self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        changed: dict[str, Any] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                changed[field.name] = change(value)
            elif isinstance(value, TensorDataclass):
                changed[field.name] = value._each(change)
        return replace(self, **changed)  # type: ignore[type-var]
