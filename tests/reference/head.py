"""The head the plain way: every logit of every row at once, and autograd through all of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def target_logprobs(hidden_MH: Tensor, weight_VH: Tensor, targets_M: Tensor) -> Tensor:
    """[M], row by row."""
    rows = [(weight_VH @ hidden).log_softmax(0)[gold] for hidden, gold in zip(hidden_MH, targets_M.tolist())]
    return torch.stack(rows)


def score_rows(
    fn: Callable[..., tuple[Tensor, ...]], hidden_MH: Tensor, weight_VH: Tensor, row_args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """``fn`` on the whole [M, V] of logits."""
    return fn(hidden_MH @ weight_VH.t(), *row_args)
