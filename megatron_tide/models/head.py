"""The output head on the rows that a loss asks for, a chunk of rows at a time.

A loss over a vocabulary V needs few numbers per row: the gold token's log-probability, a divergence. So logits exist
for one chunk of rows only, [m, V] in fp32, in the forward pass without a graph, and again in the backward pass, where
each chunk's gradient is made and used up at once. No [B, S, V] tensor exists, and memory does not grow with the
number of rows.

Precision: hidden rows and weight are multiplied in their own type and the result converted to fp32 (fp64 stays fp64);
the gradient of the logits is rounded to the weight's type before the two products of the backward pass. The weight's
gradient is accumulated in ONE buffer of the weight's type: each chunk's product is summed in fp32 inside the matmul
and rounded once when added, so bf16 takes one rounding per chunk, as gradient accumulation over micro-batches does.
With fp32 weights, exact.

No rows (M = 0) is a case like any other: empty results, and gradients that are zeros and exist, so that every rank
has them.

Shapes: M rows, m rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGIT_BYTES = 64 * 2**20  # of one chunk's fp32 logits

RowFn = Callable[..., tuple[Tensor, ...]]


def rows_per_chunk(vocab_size: int, logit_bytes: int = LOGIT_BYTES) -> int:
    """How many rows of fp32 logits over ``vocab_size`` fit ``logit_bytes`` (at least one)."""
    return max(1, logit_bytes // (4 * vocab_size))


def gold_logp(hidden_MH: Tensor, weight_VH: Tensor, gold_M: Tensor, chunk_rows: int | None = None) -> Tensor:
    """log softmax(hidden W^T) at the gold token: [M], fp32.

    ``gold_M`` int64; ``chunk_rows`` None takes :data:`LOGIT_BYTES` worth. Differentiable in hidden and weight.
    """
    assert hidden_MH.dtype == weight_VH.dtype, (hidden_MH.dtype, weight_VH.dtype)
    return _GoldLogp.apply(hidden_MH, weight_VH, gold_M, chunk_rows or rows_per_chunk(len(weight_VH)))


def score_rows(
    fn: RowFn, hidden_MH: Tensor, weight_VH: Tensor, row_args: tuple[Tensor, ...], chunk_rows: int | None = None
) -> tuple[Tensor, ...]:
    """``fn(logits [m, V] fp32, *args)`` over chunks of rows, joined: a tuple of [M] tensors.

    ``row_args`` are tensors [M, ...], sliced along with the rows; ``fn`` returns a tuple of [m] tensors, must treat
    every row on its own, and must bear m = 0. Gradients flow through the logits into hidden and weight, not into
    ``row_args`` nor into what ``fn`` closes over. ``fn`` runs again in the backward pass, so it must be a pure
    function.
    """
    assert hidden_MH.dtype == weight_VH.dtype, (hidden_MH.dtype, weight_VH.dtype)
    assert all(len(arg) == len(hidden_MH) for arg in row_args), "row_args must have one entry per row"
    return _ScoreRows.apply(fn, chunk_rows or rows_per_chunk(len(weight_VH)), hidden_MH, weight_VH, *row_args)


def _chunks(rows: int, size: int) -> Iterator[slice]:
    # No rows is one empty chunk: its products are the zero gradients.
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def _logits(hidden_mH: Tensor, weight_VH: Tensor) -> Tensor:
    logits = hidden_mH @ weight_VH.t()
    return logits if logits.dtype == torch.float64 else logits.float()


class _Gradients:
    """The two products of a linear head's backward pass, filled chunk by chunk; a gradient nobody needs is not made."""

    def __init__(self, hidden_MH: Tensor, weight_VH: Tensor, need_hidden: bool, need_weight: bool) -> None:
        self.inputs = hidden_MH, weight_VH
        self.hidden = torch.empty_like(hidden_MH) if need_hidden else None
        self.weight = torch.empty_like(weight_VH) if need_weight else None
        self.fresh = True

    def add(self, rows: slice, dlogits_mV: Tensor) -> None:
        hidden_MH, weight_VH = self.inputs
        dlogits_mV = dlogits_mV.to(weight_VH.dtype)
        if self.hidden is not None:
            torch.mm(dlogits_mV, weight_VH, out=self.hidden[rows])
        if self.weight is not None:
            # beta 0 makes the first chunk overwrite: the buffer is never cleared first.
            self.weight.addmm_(dlogits_mV.t(), hidden_MH[rows], beta=0.0 if self.fresh else 1.0)
            self.fresh = False


class _GoldLogp(torch.autograd.Function):
    """Hand-written: one fp32 chunk is turned in place from logits to gradient, with nothing beside it."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, gold_M: Tensor, chunk_rows: int) -> Tensor:
        logp, normaliser = [], []
        for rows in _chunks(len(hidden_MH), chunk_rows):
            logits = _logits(hidden_MH[rows], weight_VH)
            gold = logits.gather(1, gold_M[rows, None])[:, 0]
            top = logits.amax(1)
            lse = top + logits.sub_(top[:, None]).exp_().sum(1).log()
            logp.append(gold - lse)
            normaliser.append(lse)
        ctx.save_for_backward(hidden_MH, weight_VH, gold_M, torch.cat(normaliser))
        ctx.chunk_rows = chunk_rows
        return torch.cat(logp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, gold_M, lse_M = ctx.saved_tensors
        gradients = _Gradients(hidden_MH, weight_VH, ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        for rows in _chunks(len(hidden_MH), ctx.chunk_rows):
            grad = grad_M[rows, None]
            dlogits = _logits(hidden_MH[rows], weight_VH).sub_(lse_M[rows, None]).exp_().mul_(-grad)
            dlogits.scatter_add_(1, gold_M[rows, None], grad)
            gradients.add(rows, dlogits)
        return gradients.hidden, gradients.weight, None, None


class _ScoreRows(torch.autograd.Function):
    """The general case: the gradient of the logits is autograd's own, through ``fn`` alone, one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, fn: RowFn, chunk_rows: int, hidden_MH: Tensor, weight_VH: Tensor, *row_args: Tensor
    ) -> tuple[Tensor, ...]:
        parts = []
        for rows in _chunks(len(hidden_MH), chunk_rows):
            parts.append(fn(_logits(hidden_MH[rows], weight_VH), *(arg[rows] for arg in row_args)))
        ctx.save_for_backward(hidden_MH, weight_VH, *row_args)
        ctx.fn, ctx.chunk_rows = fn, chunk_rows
        return tuple(torch.cat(column) for column in zip(*parts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, *row_args = ctx.saved_tensors
        gradients = _Gradients(hidden_MH, weight_VH, ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        for rows in _chunks(len(hidden_MH), ctx.chunk_rows):
            logits = _logits(hidden_MH[rows], weight_VH).requires_grad_()
            with torch.enable_grad():
                outputs = ctx.fn(logits, *(arg[rows] for arg in row_args))
            used = [(output, grad[rows]) for output, grad in zip(outputs, grads_M) if output.requires_grad]
            (dlogits,) = torch.autograd.grad([output for output, _ in used], logits, [grad for _, grad in used])
            gradients.add(rows, dlogits)
        return (None, None, gradients.hidden, gradients.weight, *(None for _ in row_args))
