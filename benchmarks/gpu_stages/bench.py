"""What a stage has: its device and sizes, timings, figures that are written as they come, parts that fail alone.

python -m benchmarks.gpu_stages.bench MODULE:FUNCTION      waits for a line of settings (JSON), then runs the stage
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_tide.clock import mark, seconds_between
from megatron_tide.files import write_json
from megatron_tide.machine import machine, versions

# Dense bf16 TFLOP/s that the makers state, by words of the card's name; the first row that fits.
STATED_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "RTX 4090": 165,
    "RTX 5090": 210,
    "GB200": 2500,
    "H200": 989,
    "H100": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "A40": 150,
    "L4": 121,
}


@dataclass
class Bench:
    """``folder``: for a stage's own files; ``out``: the JSON of its figures; ``limits``: what stage a measured."""

    device: torch.device
    tiny: bool
    folder: Path
    out: Path
    limits: dict[str, Any] = field(default_factory=dict)
    real_weights: str = ""
    deadline: float = float("inf")
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds of the stage's time."""
        return self.deadline - time.monotonic()

    def note(self, **figures: Any) -> None:
        """Add figures, and write all of them."""
        self.figures |= figures
        write_json(self.out, self.figures)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a stage: where it raises, that is noted, and the stage goes on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.note(failed={**self.figures.get("failed", {}), name: said(error)})
        self.clean()

    def clean(self) -> None:
        """Give memory back."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, ways: Sequence[Callable[[], object]], rounds: int = 10, warmup: int = 2) -> list[float]:
        """Median of each way, turn by turn; on a GPU by events, so that they queue as they would in a run."""
        rounds, warmup = (1, 0) if self.tiny else (rounds, warmup)
        for _ in range(warmup):
            for way in ways:
                way()
        self.wait()
        spans: list[list[Any]] = [[] for _ in ways]
        for _ in range(rounds):
            for way, taken in zip(ways, spans):
                start = mark(self.cuda)
                way()
                taken.append((start, mark(self.cuda)))
        self.wait()
        return [1e3 * statistics.median(seconds_between(*span) for span in taken) for taken in spans]

    def seconds(self, way: Callable[[], object]) -> float:
        """Of one call, by the host's clock, until the device is done."""
        self.wait()
        started = time.perf_counter()
        way()
        self.wait()
        return time.perf_counter() - started

    def peak_bytes(self, way: Callable[[], object]) -> int:
        """Device memory that a call adds at its peak; 0 on a CPU."""
        if not self.cuda:
            way()
            return 0
        self.wait()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        self.wait()
        return torch.cuda.max_memory_allocated() - before

    def shares(self, flops: float, milliseconds: float) -> dict[str, float]:
        """FLOP/s, and its share of the measured and of the stated peak, where these are known."""
        rate = flops / (milliseconds / 1e3)
        found = {"tflops": rate / 1e12}
        for name, peak in (("measured", self.limits.get("bf16_tflops")), ("stated", self.limits.get("stated_tflops"))):
            if peak:
                found[f"of_{name}_peak"] = rate / 1e12 / peak
        return found


def stated_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a card by its name; None for one that is not in the list."""
    words = set(re.split(r"[\s-]+", name))
    return next((float(rate) for row, rate in STATED_TFLOPS.items() if set(row.split()) <= words), None)


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """|found - wanted| / |wanted|, in fp64 norms."""
    difference = torch.linalg.vector_norm(found.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()).clamp(min=1e-30))


def read_settings(told: dict[str, Any]) -> Bench:
    return Bench(
        device=torch.device(told["device"], 0) if told["device"] == "cuda" else torch.device("cpu"),
        tiny=told["tiny"],
        folder=Path(told["folder"]),
        out=Path(told["out"]),
        limits=told.get("limits", {}),
        real_weights=told.get("real_weights", ""),
        deadline=time.monotonic() + told["seconds"],
    )


def work(code: str) -> int:
    """Import a stage, wait for the word, run it; -> 1 where it raises."""
    module, _, name = code.partition(":")
    run = getattr(importlib.import_module(module), name)
    bench = read_settings(json.loads(sys.stdin.readline()))
    try:
        bench.note(frame={"machine": machine(), "versions": versions()})
        run(bench)
        bench.wait()
    except Exception as error:
        traceback.print_exc()
        bench.note(failed={**bench.figures.get("failed", {}), "stage": said(error)})
        return 1
    return 0


if __name__ == "__main__":
    status = work(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a device that faulted would hold up an orderly end
