"""How an error or a signal ends a process: its status, and the words for its user."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from types import FrameType

from megatron_tide.screen import printable, traceback_of, words_of

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
ENDING_SECONDS = 20
"""Within which a process ends that has been told to, or that failed while others wait for it."""
_TOLD = "told by megatron_tide"  # no name that an error of a library has
_OF_THE_SYSTEM = re.compile(r"\(os error \d+\)|^Symlink loop from ")  # in place of an OSError: in Rust; of a Path
_NO_MEMORY = ("can't allocate memory", "out of memory")  # of torch's errors, which are RuntimeErrors


class Ended(KeyboardInterrupt):
    """A signal that ends this process has come: on its way out it removes what is temporary."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


def end_on_signals() -> None:
    """From now on SIGTERM and SIGHUP raise :class:`Ended`, where they would end the process at once."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    for one in (signal.SIGTERM, signal.SIGHUP):  # once: `timeout` sends it to the process and to its group
        signal.signal(one, lambda *_: None)
    ended = Ended(number)
    end_within(ENDING_SECONDS, ended.status)
    raise ended


def is_of_users(error: BaseException) -> bool:
    """Whether a user can mend what an error says: a wrong input, a file, a full disk, too little memory."""
    of_system = isinstance(error, Exception) and _OF_THE_SYSTEM.search(words_of(error)) is not None
    return of_system or isinstance(error, (ValueError, OSError)) or _lacks_memory(error)


def shows_traceback() -> bool:
    """Whether tracebacks of such errors are wanted too."""
    return os.environ.get("MEGATRON_TIDE_TRACEBACK") == "1"


def _lacks_memory(error: BaseException) -> bool:
    words = words_of(error).lower() if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(text in words for text in _NO_MEMORY)


def tell(error: BaseException) -> int:
    """Print an error as ``cli.run`` does, once; its exit status."""
    known = vars(error)
    if _TOLD not in known:
        status, text = _told(error)
        known[_TOLD] = status
        if text:
            with contextlib.suppress(OSError, ValueError):  # a full disk, a closed pipe: the status is left to say it
                print(text, file=sys.stderr, flush=True)
    status = known[_TOLD]
    assert isinstance(status, int)
    return status


def end_within(seconds: float, status: int) -> None:
    """End the process with ``status`` after ``seconds`` at the latest, whatever it waits for until then."""
    last = threading.Timer(seconds, os._exit, (status,))
    last.daemon = True
    last.start()


def _told(error: BaseException) -> tuple[int, str]:
    """The status that an error ends a process with, and the words for its user."""
    if isinstance(error, SystemExit):
        if isinstance(error.code, int):
            return error.code & 255 or int(error.code != 0), ""
        return int(error.code is not None), "" if error.code is None else words_of(error)
    if isinstance(error, Ended):
        return error.status, f"ended by {words_of(error)}"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if shows_traceback() or not is_of_users(error):
        return 1, traceback_of(error).removesuffix("\n")
    words = printable(" ".join(words_of(error).split()), keep="")
    return EXIT_USER_ERROR, f"error: {f'out of memory ({words})' if _lacks_memory(error) else words}"
