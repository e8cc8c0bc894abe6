"""Self-test of the sandbox: try everything that a program must not be able to do, on this machine, before any runs."""

from __future__ import annotations

import functools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from megatron_tide.cli import say
from megatron_tide.sandbox.run import LIBRARIES, LIMITS, TIMED_OUT, Limits, Outcome, run_programs


def _refused(attempt: str, error: str = "OSError") -> str:
    return f"try:\n    {attempt}\nexcept {error}:\n    pass\nelse:\n    raise SystemExit('it was allowed')\n"


KNOWN = (
    "PYTHONHASHSEED",
    "PYTHONUTF8",
    "LD_LIBRARY_PATH",
    "LC_CTYPE",
    "MALLOC_ARENA_MAX",
    *(f"{n}_NUM_THREADS" for n in LIBRARIES),
)
# What a program must not be able to do. VICTIM: a file outside its folder; MEMORY: more bytes than it may have.
SELF_TESTS = {
    "ordinary programs run": "import math, re, itertools, collections, hashlib\nassert math.sqrt(4) == 2",
    "no process": _refused("import os; os.fork() or os._exit(0)"),
    "no other program": _refused("import os; os.execv('/bin/true', ['true'])"),
    "bounded threads": _refused(
        "import threading as t, time; t.stack_size(32768)\n"
        "    for _ in range(200): t.Thread(target=time.sleep, args=[9]).start()",
        "RuntimeError",
    ),
    "no network": _refused("import socket; socket.socket()"),
    "no writing": _refused("open('VICTIM', 'a')"),
    "no new file": _refused("open('new', 'w')"),
    "no removing": _refused("import os; os.unlink('VICTIM')"),
    "no reading of other files": _refused("open('VICTIM')"),
    "no signals to others": _refused("import os; os.kill(os.getppid(), 0)"),
    "no raising of limits": _refused("import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))", "ValueError"),
    "no environment": f"import os\nassert set(os.environ) <= {set(KNOWN)}",
    "bounded memory": _refused("bytearray(MEMORY)", "MemoryError"),
}
ENDLESS = {"bounded work": "while True: pass", "bounded sleep": "import time\nwhile True: time.sleep(1)"}


@functools.cache
def failed_self_tests(limits: Limits = LIMITS) -> tuple[str, ...]:
    """Run every self-test on this machine; returns those that failed, each with what happened, in words."""
    if not sys.platform.startswith("linux"):
        return (f"programs can be sandboxed on Linux only, and this is {sys.platform}",)
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        victim = Path(folder, "victim")
        victim.write_text("untouched")
        memory = str(2 * limits.memory_bytes)
        programs = {
            name: text.replace("VICTIM", str(victim)).replace("MEMORY", memory) for name, text in SELF_TESTS.items()
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
    """Refuse to run programs where a self-test fails; with ``unsafe`` only warn.

    Raises:
        ValueError: the self-tests that failed, and the fix.
    """
    failed = failed_self_tests()
    if not failed:
        return
    said = f"programs written by a model cannot be run safely here: {'; '.join(failed)}"
    if not unsafe:
        raise ValueError(
            f"{said}. Use another machine, leave this task out, or pass --unsafe-programs in a container that holds "
            "nothing of value"
        )
    say(f"warning: {said}; running them nevertheless (--unsafe-programs)", file=sys.stderr)
