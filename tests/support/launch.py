"""Ranks as processes of their own, started as a launcher would: for tests that kill, freeze or signal them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def ranks(arguments: list[str], world: int, logs: Path) -> Iterator[list[subprocess.Popen]]:
    """``python ARGUMENTS`` on each of ``world`` ranks, output to ``logs/rank<k>``; none is left at the end."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(world):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with (logs / f"rank{rank}").open("wb") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
                )
            )
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until(happened: Callable[[], bool], processes: list[subprocess.Popen], seconds: float = 120) -> None:
    """Wait for something that running processes bring about."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"nothing within {seconds:g} s"
        assert any(process.poll() is None for process in processes), "all processes ended"
        time.sleep(0.05)


def steps_logged(run: Path) -> int:
    """Lines of a run's metrics."""
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0
