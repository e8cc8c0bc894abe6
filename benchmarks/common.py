"""What every benchmark shares: a paired timing, and a report that says on what machine, with what, and when."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "sentencepiece", "numpy")


def report(name: str, figures: Mapping[str, Any], json_path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Print ``figures`` (name -> number), and write them with machine, versions and date to ``json_path`` if given.

    Returns the whole record: the figures stand at its top level, beside ``benchmark``, ``date``, ``machine`` and
    ``versions``. The date is UTC, ISO 8601. A figure may not use one of those four names.
    """
    frame = {"benchmark": name, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    record: dict[str, Any] = {**frame, "machine": machine(), "versions": versions()}
    assert not record.keys() & figures.keys(), "a figure has the name of one of the record's own fields"
    record.update(figures)
    width = max(map(len, figures), default=0)
    print(f"{name} on {record['machine']['cpu']}, {record['machine']['cores']} cores")
    for label, value in figures.items():
        print(f"  {label:<{width}}  {_readable(value)}")
    if json_path is not None:
        path = Path(json_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(path.suffix + ".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    return record


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
    """Python's version and that of each installed package a benchmark may lean on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def paired_seconds(
    ways: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int = 1,
) -> list[float]:
    """Median seconds of each way, measured turn by turn so that a noisy machine disturbs all of them alike."""
    for _ in range(warmup):
        for way in ways:
            way()
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, taken):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def peak_extra(way: Callable[[], object]) -> int:
    """Bytes of resident memory that ``way`` adds, at its peak, to what this process holds before it.

    Raises:
        ValueError: on another system than Linux.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError as error:
        raise ValueError(f"{error.filename}: this benchmark measures memory on Linux only ({error.strerror})") from None
    before = _kilobytes("VmRSS")
    way()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    # Only a benchmark that uses torch has an accelerator to speak of; importing torch for the others costs seconds.
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _readable(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
