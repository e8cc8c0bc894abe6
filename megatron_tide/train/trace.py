"""The last activity of a rank, to diagnose hangs: its step, and the last collective it entered or left.

torch.distributed records this for NCCL only. Its functions are wrapped once, before DeepSpeed imports
them, so that DeepSpeed's collectives are recorded too.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all_single", "barrier"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv", "reduce"),
    *("reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
)


class Trace:
    """This rank's last activity and its time."""

    def __init__(self) -> None:
        self.step = 0
        self.collective = "none yet"
        self.inside = False  # the collective has been entered, and not left
        self._moved = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since this rank's last recorded activity."""
        return time.monotonic() - self._moved

    def heartbeat(self, step: int | None = None) -> None:
        """Record progress; ``step``: the optimizer step that begins now."""
        self._moved = time.monotonic()
        if step is not None:
            self.step = step

    def watch_collectives(self) -> None:
        """Record every collective of this process from now on."""
        for name in COLLECTIVES:
            plain = getattr(getattr(dist, name), "__wrapped_by_trace__", None) or getattr(dist, name)
            setattr(dist, name, self._noted(name, plain))

    def _noted(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.collective, self.inside, self._moved = name, True, time.monotonic()
            result = plain(*args, **kwargs)
            self.inside, self._moved = False, time.monotonic()
            return result

        noted.__wrapped_by_trace__ = plain  # type: ignore[attr-defined]
        return noted
