"""A lock file for a folder: only one run at a time uses it, and a lock never outlives its process for long.

The holder touches the file every BEAT seconds. A lock that was not touched for STALE seconds has expired: its job was
killed, or its node is down. It expires at once if the process is known to have ended: it no longer exists on this
machine (same boot, same process namespace), or it is an earlier attempt of this job; and not at all while that process
is there, if only stopped. Containers that share a host name but not a process namespace cannot see each other's
processes, so between them only the touches count.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tide import scheduler
from megatron_tide.files import create_new, read_regular
from megatron_tide.ranks import on_main

NAME = ".lock"
BEAT, STALE = 10.0, 60.0  # seconds


class RunLock:
    """``with RunLock(folder)``: exclusive use of ``folder`` by this process.

    ``name``: file name of the lock. ``wait``: wait for the holder instead of raising.

    Raises:
        ValueError: on entering, if another run uses the folder (names the run), or if the file is not a lock.
    """

    def __init__(self, folder: Path, name: str = NAME, *, wait: bool = False) -> None:
        self.path, self._wait = folder / name, wait
        self._file, self._mine = -1, dict[str, Any]()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True, name="lock")

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with contextlib.suppress(FileExistsError):
                self._take()
                break
            holder = _read(self.path)
            if not _is_live(self.path, holder):
                self._take_away(holder)
            elif self._wait:
                time.sleep(0.2)
            else:
                raise ValueError(
                    f"{self.path.parent}: in use by {_described(holder)}; stop that run or wait for it, or use "
                    f"another folder (the lock of a killed run expires after {STALE:.0f} s)"
                )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        os.close(self._file)
        with contextlib.suppress(ValueError):  # something else has been put in its place
            if _read(self.path) == self._mine:
                self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        self._mine = _myself()  # kept: a host may get another name meanwhile
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            content = json.dumps(self._mine).encode()
            if os.write(self._file, content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # a full disk
            os.close(self._file)
            self.path.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def _touch(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)  # our own file, even if another process has replaced the lock

    def _take_away(self, holder: dict[str, Any]) -> None:
        """Remove the lock of ``holder``; if another process has taken it meanwhile, put it back."""
        aside = self.path.with_name(f"{self.path.name}-old-{secrets.token_hex(8)}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != holder:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path, follow_symlinks=False)
        aside.unlink()


def lock_beside(folder: Path) -> RunLock:
    """For writing ``folder`` as a whole: the lock is a hidden file next to it, because the folder is replaced."""
    return RunLock(folder.parent, f".{folder.name}.lock")


def is_held(path: Path) -> bool:
    """Whether the lock at ``path`` belongs to a running process; ValueError if it is not a lock."""
    return path.exists() and _is_live(path, _read(path))


@contextlib.contextmanager
def locked(folder: Path, world: Any) -> Iterator[None]:
    """Exclusive use of ``folder`` by this run: rank 0 holds the lock; if it cannot, all ranks raise ValueError.

    Raises:
        ValueError: as ``RunLock``, or rank 0 cannot write to the folder.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            try:
                held.enter_context(RunLock(folder))
            except OSError as error:
                raise ValueError(str(error)) from None

        on_main(world, take)
        yield


def _is_live(path: Path, holder: dict[str, Any]) -> bool:
    if _ended(holder):
        return False
    # A process that is stopped (Ctrl-Z) does not touch it. A date in the future: not touched since.
    return (_is_of_here(holder) and _started(holder["pid"]) != "") or abs(_age(path)) < STALE


def _age(path: Path) -> float:
    """Seconds since the holder's last touch, by the clock of the file system; 0 if the lock has just been removed."""
    probe = path.with_name(f"{path.name}-probe-{secrets.token_hex(8)}")
    file = create_new(probe)
    try:
        return os.fstat(file).st_mtime - path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        os.close(file)
        probe.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    job, attempt = scheduler.job()
    return {
        "cluster": scheduler.cluster(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "processes": _process_namespace(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": job,
        "attempt": attempt,
    }


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _started(process: int) -> str:
    """When a process of this machine started, in ticks since boot (process ids are reused); "" if it has ended, also if
    its parent has not asked for its status yet.
    """
    try:
        state, *rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]


def _read(path: Path) -> dict[str, Any]:
    """The content of a lock; {} if it was removed, or is not written yet.

    Raises:
        ValueError: for a link, a FIFO or anything else that is not a file, or one that this user may not read.
    """
    try:
        found = json.loads(read_regular(path, 10_000))
    except FileNotFoundError:
        return {}
    except PermissionError:
        raise ValueError(
            f"{path}: the lock of another user's run, which you may not read; wait for it, use another folder, or "
            "remove the lock if that run has ended"
        ) from None
    except OSError:
        raise ValueError(f"{path}: not a regular file, but a lock file is expected here; remove it") from None
    except (ValueError, RecursionError):  # not JSON
        return {}
    return found if isinstance(found, dict) else {}


def _ended(holder: dict[str, Any]) -> bool:
    """Whether the holder is known to have ended."""
    mine = _myself()
    same_job = bool(holder.get("job")) and all(holder.get(name, "") == mine[name] for name in ("job", "cluster"))
    if same_job and _number(holder.get("attempt")) < _number(mine["attempt"]):
        return True
    return _is_of_here(holder) and holder.get("started") != _started(holder["pid"])


def _is_of_here(holder: dict[str, Any]) -> bool:
    """Whether the holder's process id is one of those that this process sees."""
    mine = _myself()
    here = bool(mine["boot"]) and all(holder.get(name) == mine[name] for name in ("host", "boot", "processes"))
    return here and isinstance(holder.get("pid"), int)


def _number(attempt: object) -> int:
    return int(attempt) if isinstance(attempt, str) and re.fullmatch("[0-9]{1,9}", attempt) else 0


def _described(holder: dict[str, Any]) -> str:
    job, pid, host = (str(holder.get(name) or "?")[:80] for name in ("job", "pid", "host"))
    return f"{f'job {job}' if holder.get('job') else 'another run'} (process {pid} on {host})"
