"""Seconds spent in named parts of a step, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def mark(cuda: bool) -> Any:
    """This moment, for ``seconds_between``; on a GPU, when the work given to it so far is done."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Of two marks; on a GPU, after the work between them has finished."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3


class Clock:
    """Seconds spent in named parts of the step; on a GPU with events, read when a log line is due."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = mark(self._cuda)
        yield
        self._spans.append((part, start, mark(self._cuda)))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call; on a GPU, call it only after the timed work has finished."""
        seconds: dict[str, float] = {}
        for part, start, end in self._spans:
            seconds[part] = seconds.get(part, 0.0) + seconds_between(start, end)
        self._spans.clear()
        return seconds
