"""Stage a: the card's own limits, by which the other stages are judged."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_stages.bench import Bench, stated_tflops

MIB = 2**20


def run(bench: Bench) -> None:
    bench.note(**card(bench))
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with bench.part(f"matmul in {name}"):
            bench.note(**{f"{name}_tflops": matmul_tflops(bench, dtype)})
    with bench.part("memory"):
        bench.note(memory_gbs=memory_gbs(bench))
    with bench.part("copies"):
        bench.note(**copy_gbs(bench))
    with bench.part("launches"):
        bench.note(launch_us=launch_us(bench))


def card(bench: Bench) -> dict[str, Any]:
    """What the card says of itself."""
    if not bench.cuda:
        return {"card": "cpu"}
    about = torch.cuda.get_device_properties(bench.device)
    return {
        "card": about.name,
        "stated_tflops": stated_tflops(about.name),
        "memory_bytes": about.total_memory,
        "capability": [about.major, about.minor],
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
        "nccl": list(torch.cuda.nccl.version()),  # type: ignore[no-untyped-call]
    }


def matmul_tflops(bench: Bench, dtype: torch.dtype) -> float:
    """A square product, dense; fp32 without TF32, as training has it."""
    size = 64 if bench.tiny else 8192 if dtype == torch.bfloat16 else 4096
    left, right = torch.randn(2, size, size, device=bench.device).to(dtype)
    (taken,) = bench.milliseconds([lambda: left @ right.t()], rounds=20, warmup=5)
    return 2 * size**3 / taken / 1e9


def memory_gbs(bench: Bench) -> float:
    """A copy within the card; bytes read and written both count."""
    source = torch.empty((1 if bench.tiny else 4096) * MIB, dtype=torch.uint8, device=bench.device).zero_()
    target = torch.empty_like(source)
    (taken,) = bench.milliseconds([lambda: target.copy_(source)], rounds=20, warmup=3)
    return 2 * source.nbytes / taken / 1e6


def copy_gbs(bench: Bench) -> dict[str, float]:
    """Copies between host and card, from page-locked memory and from ordinary memory."""
    size = (1 if bench.tiny else 512) * MIB
    ordinary = torch.zeros(size, dtype=torch.uint8)
    pinned = ordinary.pin_memory() if bench.cuda else ordinary
    there = torch.empty(size, dtype=torch.uint8, device=bench.device)
    ways = {
        "pinned_to_card_gbs": lambda: there.copy_(pinned, non_blocking=True),
        "card_to_pinned_gbs": lambda: pinned.copy_(there, non_blocking=True),
        "ordinary_to_card_gbs": lambda: there.copy_(ordinary),
    }
    taken = bench.milliseconds(list(ways.values()), rounds=5, warmup=1)
    return {name: size / spent / 1e6 for name, spent in zip(ways, taken)}


def launch_us(bench: Bench, launches: int = 2000) -> float:
    """Host time that one small kernel costs: what a step of many small ones cannot go below."""
    number = torch.zeros(8, device=bench.device)

    def several() -> None:
        for _ in range(launches):
            number.add_(1.0)

    several()
    return bench.seconds(several) / launches * 1e6
