"""One line of progress with the time that is left."""

from __future__ import annotations

import sys
import time

_TERMINAL_SECONDS = 0.5
_LOG_SECONDS = 15.0  # a log file gets whole lines, so fewer of them


class Progress:
    """Say on stderr how far ``total`` units of work are: in place on a terminal, as lines now and then in a log."""

    def __init__(self, total: int, what: str) -> None:
        self._total = total
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._start = self._said = time.monotonic()
        self._first: int | None = None

    def update(self, done: int) -> None:
        """``done`` units are finished (of which the first call's were there before)."""
        if self._first is None:
            self._first = done
        now = time.monotonic()
        if done == self._first or now - self._said < (_TERMINAL_SECONDS if self._terminal else _LOG_SECONDS):
            return
        self._said = now
        rate = (done - self._first) / (now - self._start)
        left = _clock((self._total - done) / rate) if rate else "?"
        text = f"{self._what}: {done:,} of {self._total:,}, {rate:,.0f}/s, {left} left"
        self._say(text, "\r" if self._terminal else "\n")

    def close(self) -> None:
        """Clear the line on a terminal."""
        if self._terminal:
            self._say("", "\r")

    def _say(self, text: str, end: str) -> None:
        print(f"{text:<79}" if self._terminal else text, end=end, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
