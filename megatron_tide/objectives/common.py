"""Small things every objective needs: a name looked up in a table, a precision, and a mean over a global count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

Entry = TypeVar("Entry")


def named(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """``table[name]``, or ValueError with the valid names; ``what``: how the message calls an entry."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; use one of {', '.join(table)}")
    return table[name]


def at_least_fp32(x: Tensor) -> Tensor:
    """Log-probs and logits are worked on in fp32, or in fp64 if they come so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_over(total: Tensor, count: float) -> Tensor:
    """``total`` / ``count``; an empty batch (0 / 0) gives 0 and keeps its graph, so that every rank runs backward."""
    return total / max(count, 1.0)
