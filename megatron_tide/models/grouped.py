"""Matmul of rows that are sorted by expert with each expert's own matrix, by the kernel that this device has.

torch's grouped_mm is one kernel on a CPU, and on GPUs of compute capability 9 and 10 in bf16. On any other GPU, and in
fp32, it reads the groups' sizes on the host and calls one matmul per expert; there a kernel of our own takes its place
(``grouped_triton``). None of them waits for the device.

Shapes: R rows, E experts, I inputs, O outputs.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

TORCHS = (9, 10)  # compute capabilities for which torch has a grouped kernel (aten's _grouped_mm, 2.11 to 2.13)


def grouped_linear(rows_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """rows[r] @ weight[e].T for the expert e of each row -> [R, O]; differentiable in both.

    ``ends_E`` int32: the row behind the last one of each expert; an expert may have none.
    """
    if _has_grouped_mm(rows_RI.device, rows_RI.dtype):
        return grouped_mm(rows_RI, weight_EOI.transpose(1, 2), offs=ends_E)
    from megatron_tide.models.grouped_triton import GroupedLinear  # Triton comes with torch's CUDA build

    return GroupedLinear.apply(rows_RI, weight_EOI, ends_E)


def _has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type != "cuda" or (dtype == torch.bfloat16 and _capability(device) in TORCHS)


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]
