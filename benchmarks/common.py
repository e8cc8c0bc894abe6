"""What every benchmark shares: a paired timing, and a report that says on what machine, with what, and when."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_tide.files import atomic_write
from megatron_tide.machine import machine, reset_peak, rss_bytes, versions


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
        atomic_write(path, (json.dumps(record, indent=2) + "\n").encode())
    return record


def paired_seconds(
    ways: Sequence[Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of each way, measured turn by turn so that a noisy machine disturbs all of them alike.

    ``clock``: ``time.process_time`` counts this process's CPU time, which waits for nobody.
    """
    for _ in range(warmup):
        for way in ways:
            way()
    taken: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for way, times in zip(ways, taken):
            start = clock()
            way()
            times.append(clock() - start)
    return [statistics.median(times) for times in taken]


def peak_extra(way: Callable[[], object]) -> int:
    """Bytes of resident memory that ``way`` adds, at its peak, to what this process holds before it.

    Raises:
        ValueError: on another system than Linux.
    """
    try:
        reset_peak()
    except OSError as error:
        raise ValueError(f"{error.filename}: this benchmark measures memory on Linux only ({error.strerror})") from None
    before = rss_bytes()
    way()
    return rss_bytes("VmHWM") - before


def _readable(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
