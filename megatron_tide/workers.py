"""Processes that work for this one, and never outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from megatron_tide.screen import clean_output

_ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


@contextmanager
def workers(count: int, start: Callable[..., None] | None = None, *args: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes, each of which first calls ``start(*args)``.

    At the end of the block they finish what they have begun; where the block is interrupted, they end at once.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, _started, (start, *args)) as pool:
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # one that is half started would say so
            try:
                for _ in range(count):
                    pool.submit(_nothing)  # starts one
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            yield pool
        except (KeyboardInterrupt, GeneratorExit):
            for process in multiprocessing.active_children():
                process.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _started(start: Callable[..., None] | None, *args: Any) -> None:
    clean_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if start is not None:
        start(*args)


def _nothing() -> None:
    pass


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
