"""Grouped matmul in Triton, for GPUs without one of torch's: forward and backward, without a host synchronisation.

Rows are cut into tiles of at most ``BLOCK_R`` rows of one expert. How many tiles an expert has is known on the device
only; that there are at most R / BLOCK_R + E of them is known on the host, so that many programs start, and those
without a tile end at once. Sums are in fp32 in a fixed order: no atomics, the same bits on every run.

With TRITON_INTERPRET=1 it runs on a CPU (its test does that), where the interpreter can multiply no bf16.

Shapes: R rows, E experts, I inputs, O outputs; T tiles. Kernels name sizes by what they are for: N columns of the
result, K what is summed over.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R, BLOCK_N, BLOCK_K = 64, 64, 32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class GroupedLinear(torch.autograd.Function):
    """``grouped_linear`` of its three arguments."""

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_EOI, ends_E)
        return _by_rows(rows_RI, weight_EOI.transpose(1, 2), ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_EOI, ends_E = ctx.saved_tensors
        (grad_RO,) = grads
        drows = _by_rows(grad_RO, weight_EOI, ends_E) if ctx.needs_input_grad[0] else None
        dweight = _by_experts(grad_RO, rows_RI, ends_E, weight_EOI) if ctx.needs_input_grad[1] else None
        return drows, dweight, None


def _by_rows(rows_RK: Tensor, weight_EKN: Tensor, ends_E: Tensor) -> Tensor:
    """rows[r] @ weight[e of r] -> [R, N]."""
    rows_RK = rows_RK.contiguous()
    (count, inner), columns = rows_RK.shape, weight_EKN.shape[2]
    result = rows_RK.new_empty(count, columns)
    if result.numel():
        tiles = _tiles(ends_E, count)
        grid = (tiles.shape[1], triton.cdiv(columns, BLOCK_N))
        _rows_kernel[grid](
            rows_RK, weight_EKN, result, tiles, tiles.shape[1], columns, *weight_EKN.stride(),
            inner=inner, BLOCK_R=BLOCK_R, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, IN_FP32=INTERPRETED,
        )  # fmt: skip
    return result


def _tiles(ends_E: Tensor, rows: int) -> Tensor:
    """int32 [3, T]: each tile's expert, its first row, the row behind its expert's last; spare tiles have no rows."""
    experts = len(ends_E)
    ends_E = ends_E.long()
    starts_E = torch.cat([ends_E.new_zeros(1), ends_E[:-1]])
    tile_ends_E = ((ends_E - starts_E + BLOCK_R - 1) // BLOCK_R).cumsum(0)
    tile_T = torch.arange(rows // BLOCK_R + experts, device=ends_E.device)
    expert_T = torch.searchsorted(tile_ends_E, tile_T, right=True)
    spare_T = expert_T == experts
    expert_T = expert_T.clamp(max=experts - 1)
    before_T = torch.cat([ends_E.new_zeros(1), tile_ends_E[:-1]])[expert_T]
    first_T = starts_E[expert_T] + (tile_T - before_T) * BLOCK_R
    return torch.stack([expert_T, first_T, ends_E[expert_T].masked_fill(spare_T, 0)]).int()


def _by_experts(grad_RO: Tensor, rows_RI: Tensor, ends_E: Tensor, weight_EOI: Tensor) -> Tensor:
    """grad[rows of e].T @ rows[rows of e] -> [E, O, I]; zeros where an expert has no row."""
    grad_RO, rows_RI = grad_RO.contiguous(), rows_RI.contiguous()
    result = torch.empty_like(weight_EOI, memory_format=torch.contiguous_format)
    experts, outputs, inputs = result.shape
    grid = (experts, triton.cdiv(outputs, BLOCK_R), triton.cdiv(inputs, BLOCK_N))
    _experts_kernel[grid](
        grad_RO, rows_RI, result, ends_E, outputs, inputs,
        BLOCK_O=BLOCK_R, BLOCK_I=BLOCK_N, BLOCK_K=BLOCK_K, IN_FP32=INTERPRETED,
    )  # fmt: skip
    return result


@triton.jit
def _rows_kernel(
    rows, weight, result, tiles, tile_count, columns, stride_e, stride_k, stride_n, inner: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, IN_FP32: tl.constexpr,
):  # fmt: skip
    """One tile of rows times one tile of its expert's columns."""
    tile = tl.program_id(0)
    expert = tl.load(tiles + tile).to(tl.int64)
    first = tl.load(tiles + tile_count + tile)
    end = tl.load(tiles + 2 * tile_count + tile)
    if first < end:
        row = first + tl.arange(0, BLOCK_R)
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row_exists, column_exists = row < end, column < columns
        left = rows + row.to(tl.int64)[:, None] * inner
        right = weight + expert * stride_e + column[None, :] * stride_n
        total = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
        for start in range(0, inner, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            a = tl.load(left + k[None, :], mask=row_exists[:, None] & (k < inner)[None, :], other=0.0)
            b = tl.load(right + k[:, None] * stride_k, mask=(k < inner)[:, None] & column_exists[None, :], other=0.0)
            if IN_FP32:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision="ieee")
        place = result + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(place, total.to(result.dtype.element_ty), mask=row_exists[:, None] & column_exists[None, :])


@triton.jit
def _experts_kernel(
    grad, rows, result, ends, outputs, inputs,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, IN_FP32: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient: a sum over its rows."""
    expert = tl.program_id(0)
    end = tl.load(ends + expert)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.program_id(2) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_exists, i_exists = o < outputs, i < inputs
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    start = first
    while start < end:
        row = start + tl.arange(0, BLOCK_K)
        row_exists = row < end
        wide = row.to(tl.int64)
        a = tl.load(
            grad + wide[None, :] * outputs + o[:, None], mask=o_exists[:, None] & row_exists[None, :], other=0.0
        )
        b = tl.load(rows + wide[:, None] * inputs + i[None, :], mask=row_exists[:, None] & i_exists[None, :], other=0.0)
        if IN_FP32:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        start += BLOCK_K
    place = result + expert.to(tl.int64) * outputs * inputs + o[:, None] * inputs + i[None, :]
    tl.store(place, total.to(result.dtype.element_ty), mask=o_exists[:, None] & i_exists[None, :])
