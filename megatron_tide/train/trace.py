"""What a rank is doing, for whoever asks why a run stands still: its step, the last collective it entered or left.

torch.distributed records this for NCCL only. Its functions are wrapped once, before DeepSpeed takes hold of them, so
that DeepSpeed's collectives are seen like our own.
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
    """The last thing this rank did, and when."""

    def __init__(self) -> None:
        self.step = 0
        self.collective = "none yet"
        self.inside = False  # the collective has been entered, and not left
        self._moved = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since this rank last did something that is noted."""
        return time.monotonic() - self._moved

    def heartbeat(self, step: int | None = None) -> None:
        """Note that this rank goes on; ``step``: the optimizer step it works on from now on."""
        self._moved = time.monotonic()
        if step is not None:
            self.step = step

    def watch_collectives(self) -> None:
        """From here on every collective of this process is noted."""
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
