"""What a process takes and what a machine can give: memory watched, bytes read, matmul and disk rates."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_tide.machine import reset_peak, rss_bytes
from megatron_tide.models.layer_specs import LayerSpecs


class Timings:
    """Seconds, bytes read from disk and peak resident memory of named parts, printed as they begin and end."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        print(f"== {name}", flush=True)
        reset_peak()
        started, read = time.perf_counter(), bytes_read()
        yield
        seconds, peak = time.perf_counter() - started, rss_bytes("VmHWM")
        self.parts[name] = {"seconds": seconds, "bytes_read": bytes_read() - read, "peak_rss_bytes": peak}
        print(f"   {seconds:.1f} s, peak {peak / 2**30:.2f} GiB", flush=True)

    @property
    def peak(self) -> float:
        """Peak resident bytes over all parts."""
        return max(part["peak_rss_bytes"] for part in self.parts.values())


def bytes_read() -> int:
    """Bytes this process has had fetched from a disk (the page cache does not count)."""
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes:"))
    return int(line.split()[1])


def stop_above(limit: int) -> None:
    """End this process with a clear line, should it hold more than ``limit`` bytes; looked at ten times a second."""

    def watch() -> None:
        while (held := rss_bytes()) <= limit:
            time.sleep(0.1)
        print(f"error: this process holds {held / 2**30:.1f} GiB, the limit is {limit / 2**30:.1f}", flush=True)
        os._exit(2)

    threading.Thread(target=watch, daemon=True, name="memory").start()


def folder_bytes(*folders: Path) -> int:
    """Bytes that files in these folders take on disk; one may lie in another."""
    files = {path.resolve() for folder in folders for path in folder.rglob("*") if path.is_file()}
    return sum(file.stat().st_blocks * 512 for file in files)


def sweep_operations(specs: LayerSpecs, shapes: list[tuple[int, int]], rows: int) -> float:
    """Floating-point operations of one sweep: ``shapes`` (sequences, length) of its micro-batches, ``rows`` scored."""
    config: Any = specs.config
    routed = config.num_experts_per_tok / config.num_experts
    per_token = 0.0
    for layer in specs.layers:
        for name, tensor in layer.tensors.items():
            per_token += 2 * tensor.numel() * (routed if ".experts." in f".{name}." else 1.0)
    attention = 4 * config.num_attention_heads * config.head_dim * len(specs.layers)
    head = 2 * config.hidden_size * config.vocab_size * rows
    return head + sum(n * length * (per_token + attention * length) for n, length in shapes)
