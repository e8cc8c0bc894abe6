"""Ranks that tests kill, freeze or signal, and commands whose status and words they read: processes of their own."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from megatron_tide import cli
from tests.support.ranks import forkserver

REPOSITORY = Path(__file__).resolve().parents[2]
Main = Callable[[list[str]], int]


class Rank(ForkServerProcess):
    """``cli.run(main, argv)`` in a process that has its libraries imported already; ``poll`` is that of Popen."""

    def poll(self) -> int | None:
        return self.exitcode


@contextmanager
def ranks(main: Main, argv: list[str], world: int, logs: Path) -> Iterator[list[Rank]]:
    """``main(argv)`` on each of ``world`` ranks, output to ``logs/rank<k>``; none is left at the end."""
    logs.mkdir(parents=True, exist_ok=True)
    forkserver()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(world):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(Rank(target=_run, args=(main, argv, logs / f"rank{rank}", environment)))
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(main: Main, argv: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    cli.run(main, argv)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its status, and what it wrote to both streams, as a terminal shows it."""

    status: int
    printed: str

    @property
    def last_line(self) -> str:
        return self.printed.strip().splitlines()[-1]


def run_command(main: Main, argv: Sequence[object], folder: Path, seconds: float = 240) -> Ended:
    """``main(argv)`` to its end, as one process without a launcher would run it; ``folder``: for its output."""
    with ranks(main, [str(word) for word in argv], 1, folder) as (process,):
        process.join(seconds)
        assert process.exitcode is not None, f"{argv} did not end within {seconds:g} s"
        return Ended(process.exitcode, (folder / "rank0").read_text())


def wait_until(
    happened: Callable[[], bool], processes: Sequence[subprocess.Popen | Rank], seconds: float = 120
) -> None:
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
