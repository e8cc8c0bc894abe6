"""What a terminal is given: text of models, files and libraries, without what it would act on, or hide."""

from __future__ import annotations

import io
import re
import sys
import traceback
from typing import Any, TextIO

LAYOUT = "\n\t\u3000\xa0\u200c\u200d"  # and what writing needs: wide and fixed spaces, joiners
LONGEST_WORDS = 10_000  # characters of an error, and of a part of a traceback
_LONG_WORD = re.compile(r"\S{1001,}")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_UP = re.compile(r"(\x1b\[A)+")  # how tqdm goes from one bar to the one above


def printable(text: object, keep: str = LAYOUT) -> str:
    """``text`` with everything that a terminal would act on, or hide, as an escape, but for the characters of ``keep``:
    lines and tabs, unless it is to be one line.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))


def words_of(error: BaseException) -> str:
    """What an error says, shortened, each of its words too; its kind where it says nothing, or fails to."""
    try:
        text = str(error)
    except Exception:
        text = ""
    text = _LONG_WORD.sub(lambda word: f"{word[0][:500]}...", shortened(text))
    return text if text.strip() else type(error).__name__


def traceback_of(error: BaseException) -> str:
    return "".join(map(shortened, traceback.format_exception(error)))


def shortened(text: str) -> str:
    if len(text) <= LONGEST_WORDS:
        return text
    return f"{text[:LONGEST_WORDS]} ... ({len(text):,} characters){chr(10) * text.endswith(chr(10))}"


def clock_text(seconds: float) -> str:
    """1:02:03 or 02:03."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes:02d}:{secs:02d}"


class CleanStream:
    """A text stream that writes ``printable`` text, whoever prints: libraries and tracebacks repeat names of files,
    keys of JSON, and what a model wrote. Colours are taken out. ``bars``: progress bars may go back on their line.
    """

    def __init__(self, plain: TextIO, bars: bool) -> None:
        self.plain, self._bars = plain, bars

    def write(self, text: str) -> int:
        if self._bars and _UP.fullmatch(text):
            self.plain.write(text)
        else:
            back = "\r" if self._bars and text.startswith("\r") else ""
            self.plain.write(back + printable(_COLOURS.sub("", text[len(back) :])))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain, name)


def clean_output() -> None:
    """From now on all that this process prints is clean, errors that nobody catches included."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, CleanStream):
            if isinstance(stream, io.TextIOWrapper):  # where the locale has no such character
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, CleanStream(stream, bars=name == "stderr"))


def plain(stream: Any) -> Any:
    """The stream behind a clean one, for text that is clean and its own control sequences."""
    return stream.plain if isinstance(stream, CleanStream) else stream
