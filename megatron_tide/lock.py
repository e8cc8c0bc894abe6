"""One run folder, one run: a file that says who works in it, and that nobody leaves behind for good.

The holder's file is as fresh as its last touch (every BEAT seconds), so a job that was killed, or whose node is gone,
gives its folder free after STALE seconds without anyone's doing; at once, if it can be seen that it has ended: its
process on this machine is gone, or it is this very Slurm job, requeued.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = ".lock"
BEAT, STALE = 10.0, 60.0  # seconds


class RunLock:
    """``with RunLock(folder)``: this process works in ``folder``, and no other that asks.

    Raises:
        ValueError: on entering, when another run works there: who, where, since when.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True, name="lock")

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = json.dumps(_myself())
        while not _created(self.path, mine):
            holder = _read(self.path)
            if not _ended(holder) and self._age() < STALE:
                raise ValueError(
                    f"{self.path.parent}: {_described(holder)} works in it; stop that run or wait for it, or take "
                    f"another folder (a run that was killed gives its folder free after {STALE:.0f} s)"
                )
            self._take_away(holder)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        if _read(self.path) == _myself():
            self.path.unlink(missing_ok=True)

    def _touch(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _age(self) -> float:
        """Seconds since the holder's last touch, by the clock of the file system; 0 if it has just gone."""
        probe = self.path.with_name(f"{NAME}-{socket.gethostname()}-{os.getpid()}")
        try:
            probe.touch()
            return probe.stat().st_mtime - self.path.stat().st_mtime
        except FileNotFoundError:
            return 0.0
        finally:
            probe.unlink(missing_ok=True)

    def _take_away(self, holder: dict[str, Any]) -> None:
        """Remove the lock of ``holder``; if it has become another's meanwhile, put it back."""
        aside = self.path.with_name(f"{NAME}-old-{socket.gethostname()}-{os.getpid()}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        if _read(aside) != holder:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink()


@contextlib.contextmanager
def locked(folder: Path, world: Any) -> Iterator[None]:
    """``folder`` for this run alone while inside: rank 0 holds the lock, all ranks are refused alike."""
    with contextlib.ExitStack() as held:
        refusal = None
        if world.is_main:
            try:
                held.enter_context(RunLock(folder))
            except ValueError as error:
                refusal = str(error)
        refusal = world.broadcast_object(refusal)
        if refusal is not None:
            raise ValueError(refusal)
        yield


def _created(path: Path, content: str) -> bool:
    """Write the file, unless it is there; whole or not at all."""
    draft = path.with_name(f"{NAME}-new-{socket.gethostname()}-{os.getpid()}")
    draft.write_text(content)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started("self"),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "attempt": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _started(process: int | str) -> str:
    """When a process of this machine started, in ticks since boot; "" if there is none (numbers are used again)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _ended(holder: dict[str, Any]) -> bool:
    """Whether it can be seen from here that the holder has ended."""
    mine = _myself()
    if holder.get("job") and holder["job"] == mine["job"] and holder.get("attempt") != mine["attempt"]:
        return True
    return holder.get("host") == mine["host"] and holder.get("started") != _started(holder.get("pid", 0))


def _described(holder: dict[str, Any]) -> str:
    job = f"job {holder['job']}" if holder.get("job") else "another run"
    return f"{job} (process {holder.get('pid', '?')} on {holder.get('host', '?')})"
