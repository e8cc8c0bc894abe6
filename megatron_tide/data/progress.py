"""A progress bar that also suits a log."""

from __future__ import annotations

import sys

from tqdm import tqdm

from megatron_tide.screen import printable


class Progress:
    """Progress on stderr: ``done`` of ``total`` units of work are already finished.

    A terminal has a bar; a log gets a line per minute, and none from work that is over sooner.
    """

    def __init__(self, total: int, what: str, done: int = 0) -> None:
        seconds = 0.5 if sys.stderr.isatty() else 60.0
        self._bar = tqdm(
            desc=printable(what, keep=""), total=total, initial=done, mininterval=seconds, delay=seconds, leave=False
        )

    def update(self, done: int) -> None:
        """``done`` units are finished."""
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Clear the bar."""
        self._bar.close()
