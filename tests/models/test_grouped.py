"""Grouped matmuls against a loop over the experts, values and gradients; which device takes which."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from megatron_tide.models import grouped
from megatron_tide.models.grouped import grouped_linear

SIZES = [3, 0, 130, 64, 1, 0]  # rows of each expert: none, less than a tile, a whole one, more than two
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def sample(dtype: torch.dtype, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, inputs, outputs = sum(sizes), 72, 40
    made = (torch.randn(shape, generator=generator) for shape in ((rows, inputs), (len(sizes), outputs, inputs)))
    x, weight = ((tensor / 4).to(dtype).requires_grad_() for tensor in made)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    return x, weight, ends, torch.randn(rows, outputs, generator=generator).to(dtype)


def loop(x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    parts = [part.float() @ matrix.float().T for part, matrix in zip(x.split(sizes), weight)]
    return torch.cat(parts).to(x.dtype)


def check(function, dtype: torch.dtype, sizes: list[int]) -> None:
    x, weight, ends, grad = sample(dtype, sizes)
    found = function(x, weight, ends)
    wanted = loop(x, weight, sizes)
    assert found.dtype == dtype
    both = [found, *torch.autograd.grad(found, (x, weight), grad)]
    for mine, theirs in zip(both, [wanted, *torch.autograd.grad(wanted, (x, weight), grad)]):
        torch.testing.assert_close(mine, theirs, rtol=PRECISION[dtype], atol=PRECISION[dtype])
    assert not any(both[2][expert].any() for expert, rows in enumerate(sizes) if rows == 0)


@pytest.mark.parametrize("dtype", PRECISION)
def test_the_cpus_equals_the_loop(dtype: torch.dtype) -> None:
    check(grouped_linear, dtype, SIZES)


def test_torchs_kernel_is_chosen_by_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(major: int, dtype: torch.dtype) -> bool:
        monkeypatch.setattr(grouped, "_capability", lambda device: major)
        return grouped._has_grouped_mm(torch.device("cuda", 0), dtype)

    majors = (7, 8, 9, 10, 12)
    assert [chosen(major, torch.bfloat16) for major in majors] == [False, False, True, True, False]
    assert not any(chosen(major, dtype) for major in majors for dtype in (torch.float32, torch.float16))
    assert grouped._has_grouped_mm(torch.device("cpu"), torch.float32)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which comes with torch's CUDA build")
def test_ours_equals_the_loop() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    code = "from tests.models.test_grouped import interpreted; interpreted()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which comes with torch's CUDA build")
@pytest.mark.parametrize("number", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_ours_is_compiled_without_a_card(capability: int, number: str) -> None:
    """Down to machine code, which needs no GPU: both layouts of the weights, and the gradient of the weights."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_tide.models import grouped_triton as ours

    blocks = {"BLOCK_K": ours.BLOCK_K, "IN_FP32": False}
    by_rows = {**blocks, "inner": 2048, "BLOCK_R": ours.BLOCK_R, "BLOCK_N": ours.BLOCK_N}
    by_experts = {**blocks, "BLOCK_O": ours.BLOCK_R, "BLOCK_I": ours.BLOCK_N}
    for kernel, constants in (
        (ours._rows_kernel, {**by_rows, "stride_k": 1}),
        (ours._rows_kernel, {**by_rows, "stride_n": 1}),
        (ours._experts_kernel, by_experts),
    ):
        pointers = {"rows": number, "weight": number, "result": number, "grad": number, "tiles": "i32", "ends": "i32"}
        kinds = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in kernel.arg_names}
        kinds |= dict.fromkeys(constants, "constexpr")
        fixed = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=fixed)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.metadata.shared <= 99 * 1024  # what every card of these has for a block


def interpreted() -> None:
    from megatron_tide.models.grouped_triton import GroupedLinear

    for dtype in PRECISION:
        for sizes in (SIZES, [0, 0, 5], [200], [64, 0, 64]):
            check(GroupedLinear.apply, dtype, sizes)
    x, weight, ends, _ = sample(torch.float32, [0, 0])
    assert GroupedLinear.apply(x, weight, ends).shape == (0, 40)
