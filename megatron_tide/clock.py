"""Seconds spent in named parts of a step, without waiting for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Seconds spent in named parts of the step; on a GPU with events, read when a log line is due."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((part, start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds by part since the last call; on a GPU, call it only after the timed work has finished."""
        seconds: dict[str, float] = {}
        for part, start, end in self._spans:
            spent = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            seconds[part] = seconds.get(part, 0.0) + spent
        self._spans.clear()
        return seconds
