"""The output head on the scored positions, one slice of logits at a time.

A loss over a vocabulary V needs few numbers per row: the target's log-probability, a divergence. So logits exist
for one slice only, in fp32, in the forward pass without a graph, and again in the backward pass, where each slice's
gradient is computed and used at once. No [B, S, V] tensor exists, and memory does not grow with the number of rows.

:func:`score_rows` takes any function of complete rows, so it works on slices of rows. :func:`target_logprobs` needs no
complete row: it works on slices of the vocabulary, with a running log-sum-exp; each row of the weight's
gradient is then one matmul over all rows, written once.

Precision: hidden rows and weight are multiplied in their own type and the result converted to fp32 (fp64 stays fp64);
the gradient of the logits is rounded to the weight's type before the two products of the backward pass. The weight's
gradient is ONE buffer of the weight's type. In :func:`target_logprobs` every number of it is rounded once; in
:func:`score_rows` slices are added up in it, so bf16 takes one rounding per slice, as gradient accumulation over
micro-batches does.

No rows (M = 0) gives empty results, and gradients that exist and are zero, so that every rank has them.

Shapes: M rows, m rows of a slice, H hidden size, V vocabulary, v a slice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tide.fast import ON_CPU, piece_sizes

RowFn = Callable[..., tuple[Tensor, ...]]


def rows_per_slice(vocab_size: int, logit_bytes: int = ON_CPU.logit_bytes) -> int:
    """How many rows of fp32 logits over ``vocab_size`` fit ``logit_bytes`` (at least one)."""
    return max(1, logit_bytes // (4 * vocab_size))


def target_logprobs(hidden_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, slice_rows: int | None = None) -> Tensor:
    """log softmax(hidden W^T) at the target token: [M], fp32.

    ``targets_M`` int64. Differentiable in hidden and weight. Logits take at most the memory of ``slice_rows`` complete
    rows; None: by the device (:func:`piece_sizes`).
    """
    assert hidden_MH.dtype == weight_VH.dtype, (hidden_MH.dtype, weight_VH.dtype)
    rows, vocab = len(hidden_MH), len(weight_VH)
    sizes = piece_sizes(hidden_MH.device)
    width = (slice_rows or rows_per_slice(vocab, sizes.logit_bytes)) * vocab // max(rows, 1)
    return _TargetLogprobs.apply(hidden_MH, weight_VH, targets_M, _pieces(vocab, width, sizes.multiple))


def score_rows(
    fn: RowFn, hidden_MH: Tensor, weight_VH: Tensor, row_args: tuple[Tensor, ...], slice_rows: int | None = None
) -> tuple[Tensor, ...]:
    """``fn(logits [m, V] fp32, *args)`` over slices of rows, joined: a tuple of [M] tensors.

    ``row_args`` are tensors [M, ...], sliced along with the rows; ``fn`` returns a tuple of [m] tensors, must treat
    rows independently, and must accept m = 0. Gradients flow through the logits into hidden and weight, not into
    ``row_args`` nor into what ``fn`` closes over. ``fn`` runs again in the backward pass, so it must be a pure
    function.
    """
    assert hidden_MH.dtype == weight_VH.dtype, (hidden_MH.dtype, weight_VH.dtype)
    assert all(len(arg) == len(hidden_MH) for arg in row_args), "row_args must have one entry per row"
    sizes = piece_sizes(hidden_MH.device)
    most = slice_rows or rows_per_slice(len(weight_VH), sizes.logit_bytes)
    chunks = _pieces(len(hidden_MH), most, sizes.multiple)
    return _ScoreRows.apply(fn, chunks, hidden_MH, weight_VH, *row_args)


def _pieces(total: int, most: int, multiple: int = 1) -> list[slice]:
    """The smallest number of equal slices with at most ``most`` each; one empty slice for 0.

    Sizes are multiples of ``multiple``, except the last one's; one of that size is never too large.
    """
    most = max(1, most // multiple) * multiple
    count = max(1, -(-total // most))
    size = -(-total // (count * multiple)) * multiple
    return [slice(start, min(start + size, total)) for start in range(0, max(total, 1), max(size, 1))]


class _Logits:
    """Logits of one slice at a time, all in the same memory: a result is valid until the next call.

    Where memory is paged in on first touch (any CPU), fresh memory costs as much as a good part of its matmul.
    """

    def __init__(self, rows: int, columns: int, weight: Tensor) -> None:
        self.product = weight.new_empty(rows * columns)
        wide = weight.dtype in (torch.float32, torch.float64)
        self.exact = self.product if wide else torch.empty_like(self.product, dtype=torch.float32)

    def __call__(self, hidden: Tensor, weight: Tensor) -> Tensor:
        shape = len(hidden), len(weight)
        product = self.product[: shape[0] * shape[1]].view(shape)
        torch.mm(hidden, weight.t(), out=product)
        if self.exact is self.product:
            return product
        return self.exact[: product.numel()].view(shape).copy_(product)


class _Gradients:
    """The two products of a linear head's backward pass, filled slice by slice; gradients that are not needed are not
    computed.
    """

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


class _TargetLogprobs(torch.autograd.Function):
    """Hand-written: a slice turns in place from logits to gradient, without another buffer.

    The forward pass leaves the last slice's exponentials where they are, and the backward pass begins with them: one
    slice is not computed again, and if the full vocabulary is one slice, none is.
    """

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, targets_M: Tensor, slices: list[slice]) -> Tensor:
        ctx.slices = slices
        ctx.logits_of = _Logits(len(hidden_MH), slices[0].stop, weight_VH)
        exact = ctx.logits_of.exact
        target_logit_M, total_M = exact.new_zeros(len(hidden_MH)), exact.new_zeros(len(hidden_MH))
        top_M = torch.full_like(total_M, -torch.inf)
        for columns in slices:
            logits_Mv = ctx.logits_of(hidden_MH, weight_VH[columns])
            inside_M, place_M = _within(targets_M, columns)
            target_logit_M = torch.where(inside_M, logits_Mv.gather(1, place_M[:, None])[:, 0], target_logit_M)
            top_M, before_M = torch.maximum(top_M, logits_Mv.amax(1)), top_M
            exponential_Mv = logits_Mv.sub_(top_M[:, None]).exp_()
            total_M = total_M * (before_M - top_M).exp() + exponential_Mv.sum(1)
        lse_M = top_M + total_M.log()
        ctx.save_for_backward(hidden_MH, weight_VH, targets_M, lse_M)
        ctx.kept = exponential_Mv, (top_M - lse_M).exp()
        return target_logit_M - lse_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, targets_M, lse_M = ctx.saved_tensors
        dhidden_MH = torch.zeros_like(hidden_MH, dtype=lse_M.dtype) if ctx.needs_input_grad[0] else None
        dweight_VH = torch.empty_like(weight_VH) if ctx.needs_input_grad[1] else None
        # Used up in place, so a second backward pass through the same graph computes the last slice like the others.
        kept, ctx.kept = ctx.kept, None
        for columns in reversed(ctx.slices):
            if kept is None:
                dlogits_Mv = ctx.logits_of(hidden_MH, weight_VH[columns]).sub_(lse_M[:, None]).exp_()
                dlogits_Mv.mul_(-grad_M[:, None])
            else:
                (exponential_Mv, scale_M), kept = kept, None
                dlogits_Mv = exponential_Mv.mul_((-grad_M * scale_M)[:, None])
            inside_M, place_M = _within(targets_M, columns)
            dlogits_Mv.scatter_add_(1, place_M[:, None], (grad_M * inside_M)[:, None])
            dlogits_Mv = dlogits_Mv.to(weight_VH.dtype)
            if dhidden_MH is not None:
                dhidden_MH += dlogits_Mv @ weight_VH[columns]
            if dweight_VH is not None:
                torch.mm(dlogits_Mv.t(), hidden_MH, out=dweight_VH[columns])
        return None if dhidden_MH is None else dhidden_MH.to(hidden_MH.dtype), dweight_VH, None, None


def _within(targets_M: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is in a slice of the vocabulary, and its index there (any index if it is not)."""
    place_M = targets_M - columns.start
    size = columns.stop - columns.start
    return (place_M >= 0) & (place_M < size), place_M.clamp(0, size - 1)


class _ScoreRows(torch.autograd.Function):
    """The general case: autograd computes the gradient of the logits through ``fn``, one slice at a time."""

    @staticmethod
    def forward(
        ctx: Any, fn: RowFn, chunks: list[slice], hidden_MH: Tensor, weight_VH: Tensor, *row_args: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.fn, ctx.chunks = fn, chunks
        logits_of = _Logits(chunks[0].stop, len(weight_VH), weight_VH)
        columns: list[Tensor] = []
        for rows in chunks:
            parts = fn(logits_of(hidden_MH[rows], weight_VH), *(arg[rows] for arg in row_args))
            columns = columns or [part.new_empty(len(hidden_MH)) for part in parts]
            for column, part in zip(columns, parts):
                column[rows] = part  # copied at once: a part may be a view of the logits
        ctx.save_for_backward(hidden_MH, weight_VH, *row_args)
        return tuple(columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_M: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MH, weight_VH, *row_args = ctx.saved_tensors
        logits_of = _Logits(ctx.chunks[0].stop, len(weight_VH), weight_VH)
        gradients = _Gradients(hidden_MH, weight_VH, ctx.needs_input_grad[2], ctx.needs_input_grad[3])
        for rows in ctx.chunks:
            logits = logits_of(hidden_MH[rows], weight_VH).detach().requires_grad_()
            with torch.enable_grad():
                outputs = ctx.fn(logits, *(arg[rows] for arg in row_args))
            used = [(output, grad[rows]) for output, grad in zip(outputs, grads_M) if output.requires_grad]
            (dlogits,) = torch.autograd.grad([output for output, _ in used], logits, [grad for _, grad in used])
            gradients.add(rows, dlogits)
        return (None, None, gradients.hidden, gradients.weight, *(None for _ in row_args))
