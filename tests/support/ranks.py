"""Run a function on several real processes that form one gloo world, under a timeout."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any


def run_on_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 180) -> list[Any]:
    """``[function(*args) of rank 0, of rank 1, ...]``; ``function`` must be importable, results must pickle.

    Ranks are forked from one process that lives as long as the tests: they have its environment and standard streams.

    Raises AssertionError with the traceback of a rank that failed, or naming the ranks that did not answer in time;
    no process is left behind either way.
    """
    context = forkserver()
    answers: Any = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=_rank, args=(r, world, port, function, args, answers)) for r in range(world)]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(results) < world:
            try:
                rank, error, value = answers.get(timeout=max(0.01, deadline - time.monotonic()))
            except queue.Empty:
                missing = sorted(set(range(world)) - set(results))
                raise AssertionError(f"ranks {missing} of {world} did not answer within {timeout:g} s") from None
            assert error is None, f"rank {rank}:\n{error}"
            results[rank] = value
    finally:
        for process in ranks:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world)]


def forkserver() -> multiprocessing.context.ForkServerContext:
    """The process that others are forked from, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preload"])
    return context


def _rank(rank: int, world: int, port: int, function: Callable[..., Any], args: tuple, answers: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    try:
        answers.put((rank, None, function(*args)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
