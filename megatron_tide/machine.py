"""The environment of a measurement: machine, matmul rate, package versions, memory of this process."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tide.gpus import refuse_idle_gpu

if TYPE_CHECKING:
    import torch

CGROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")
MATMUL = 2048  # size of the square matrices in the timed product
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "numpy")


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, memory in bytes, accelerator names, operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": _accelerators(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of each installed package that matters to a measurement."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def matmul_rate(dtype: torch.dtype, rounds: int = 5) -> float:
    """Floating-point operations per second of a square matmul on the CPU, the best of several rounds."""
    import torch

    left, right = (torch.randn(MATMUL, MATMUL).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * MATMUL**3 / best


def rss_bytes(field: str = "VmRSS") -> int:
    """A memory field of /proc/self/status in bytes; ``VmHWM`` is the peak since the start or ``reset_peak``."""
    return _field(PROC / "self/status", field)


def free_memory() -> int:
    """Free memory in bytes of this node, or of the container or job, if that is less."""
    return min([_field(PROC / "meminfo", "MemAvailable"), *_free_in_cgroups()])


def _free_in_cgroups() -> Iterator[int]:
    """Free bytes in each control group of this process that sets a limit."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root, names = CGROUPS, ("memory.max", "memory.current", "file")  # version 2
        if controllers:
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
            if "memory" not in controllers.split(","):
                continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder == root or root in folder.parents:
                yield from _left(folder, *names)


def _left(folder: Path, limit: str, used: str, cached: str) -> Iterator[int]:
    try:
        most = int((folder / limit).read_text())  # "max" is no number
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield most - int((folder / used).read_text()) + int(stat[cached])  # cached files are given up when needed
    except (OSError, ValueError, KeyError):
        return


def _field(path: Path, name: str) -> int:
    """A field of a file of ``Name:   123 kB`` lines, in bytes."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Reset the peak (``VmHWM``) to the current value."""
    Path("/proc/self/clear_refs").write_text("5")


def device_of(name: str) -> str:
    """The device of a command's ``--device``; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: cuda was requested and torch sees no GPU; or auto, and it cannot use the one there is.
    """
    import torch  # takes seconds, and most of what imports this file has no use for it

    if name == "auto":
        refuse_idle_gpu()
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no GPU; remove the flag, or install torch's CUDA build")
    return name


def devices_of(name: str) -> list[str]:
    """:func:`device_of`, and behind it the other GPUs, unless ``name`` is one device."""
    import torch

    first = device_of(name)
    return [first, *(f"cuda:{index}" for index in range(1, torch.cuda.device_count()))] if first == "cuda" else [first]


DEVICE_HELP = "cpu, cuda, or auto: a GPU if there is one"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    # Only a measurement that uses torch has an accelerator to speak of; importing torch for the others costs seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
