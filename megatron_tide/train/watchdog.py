"""End the run when a rank dies or hangs, instead of leaving the others in a collective forever.

Each rank publishes its activity and its time in the process group's store, which rank 0 or its launcher serves. On each
rank a thread watches all of them, and waits for nothing, also not for the store:

    silent    a rank publishes nothing new: its process is dead or frozen, or its node is lost
    hanging   a rank publishes that it makes no progress
    failed    a rank publishes an error of its own, with its text

After --hang-timeout seconds of the first two (of the first at most SILENCE), GRACE seconds after an error, or at once
when a collective fails and a rank is silent or has failed, the remaining ranks report that rank, its step and its last
collective (and its error), and exit with status EXIT_LOST: within PATIENCE, whatever happens to what they print.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_tide.cli import say
from megatron_tide.errors import ENDING_SECONDS, end_within, tell
from megatron_tide.ranks import stated
from megatron_tide.screen import words_of
from megatron_tide.train.distributed import DistContext, destroy_distributed, init_distributed

EXIT_LOST = 3
BEAT = 1.0
SILENCE = 900.0  # seconds without a sign of a rank's process, also where a rank may work for longer between collectives
PATIENCE = 10.0  # seconds to find the cause of a failed collective, or to tell it
GRACE = 5.0  # seconds for an error that all ranks have to end each of them


@contextlib.contextmanager
def group_for_a_run(hang_timeout: float = math.inf) -> Iterator[DistContext]:
    """:func:`init_distributed`, watched by a :class:`HangWatchdog`, and :func:`destroy_distributed` after success only.

    A rank that fails prints its error and ends its process: the others may be in a collective, and leaving a group of
    NCCL waits for them.
    """
    world = init_distributed()
    try:
        with HangWatchdog(world, hang_timeout):
            yield world
    except BaseException as error:
        if world.size > 1:
            _end_process(tell(error))
        destroy_distributed()
        raise
    destroy_distributed()


def _end_process(status: int) -> None:
    """End without waiting for another rank, after what is registered for the end (as of the teacher's disk)."""
    end_within(ENDING_SECONDS, status)
    for end in (sys.stdout.flush, sys.stderr.flush, atexit._run_exitfuncs):
        with contextlib.suppress(Exception):  # such as a full disk: the process ends all the same
            end()
    os._exit(status)


@dataclass
class RankStatus:
    """A rank's last published activity, and when it last changed."""

    beat: int = -1
    since: float = 0.0
    age: float = 0.0
    step: int = 0
    collective: str = "none yet"
    inside: bool = False
    error: str = ""
    failed: float = math.inf
    """When its error was seen."""

    @property
    def silence(self) -> float:
        return time.monotonic() - self.since

    def place(self) -> str:
        return f"step {self.step}, {'in' if self.inside else 'last collective'} {self.collective}"


class HangWatchdog:
    """``with HangWatchdog(world, seconds):`` does nothing for a single rank. ``seconds``: infinite, if a rank may work
    for any time without a collective.
    """

    def __init__(self, world: DistContext, hang_timeout: float) -> None:
        self._world, self._stall, self._error = world, hang_timeout, ""
        self._stopped, self._parted = threading.Event(), threading.Event()
        self._seen = [RankStatus(since=time.monotonic()) for _ in range(world.size)]
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"watchdog {work.__name__}")
            for work in (self._exchange, self._watch)
        ]

    def __enter__(self) -> HangWatchdog:
        if self._world.size > 1:
            self._store = self._connect()
            self._tell(0)
            self._world.sum_over_ranks([0.0])  # every rank has published its status
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._world.size == 1:
            return
        if error is not None and not isinstance(error, KeyboardInterrupt):
            if self._of_a_collective(error):
                self._wait_for_cause()
            else:
                self._publish(error)
        self._stopped.set()
        for thread in self._threads:
            thread.join(PATIENCE)  # a frozen store does not answer

    @staticmethod
    def _connect() -> dist.TCPStore:
        """A separate connection: the group's own blocks while a collective is being set up."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)

    def _tell(self, beat: int) -> None:
        trace = self._world.trace
        status = [beat, trace.age, trace.step, trace.collective, trace.inside, self._error]
        self._store.set(f"watch/{self._world.rank}", json.dumps(status))

    def _exchange(self) -> None:
        """Tell the others of this rank, and see what they tell, until the store is gone."""
        for beat in itertools.count(1):
            if self._stopped.wait(BEAT):
                return
            try:
                self._tell(beat)
                self._look()
            except RuntimeError:
                self._parted.set()
                return

    def _watch(self) -> None:
        while not self._stopped.wait(BEAT):
            if not self._parted.is_set():
                self._judge()
            elif not self._stopped.wait(PATIENCE):  # the store is on rank 0's node
                known = f"{self._named(0)} failed: {self._seen[0].error}" if self._seen[0].error else ""
                self._leave(0, known or "rank 0 has exited, or its node does not respond")

    def _look(self) -> None:
        """Take note of what the ranks have published since the last time; a text that is no status is none."""
        published = self._store.multi_get([f"watch/{rank}" for rank in range(self._world.size)])
        for seen, text in zip(self._seen, published):
            status = _status(text)
            if status is None or status[0] == seen.beat:
                continue
            seen.beat, seen.age, seen.step, seen.collective, seen.inside, seen.error = status
            seen.since = time.monotonic()
            seen.failed = min(seen.failed, seen.since) if seen.error else math.inf

    def _judge(self) -> None:
        first = min(range(self._world.size), key=lambda rank: self._seen[rank].failed)
        if time.monotonic() - self._seen[first].failed > GRACE and first != self._world.rank:
            self._leave(first, f"{self._named(first)} failed: {self._seen[first].error}")
        if self._seen[first].error:
            return  # the others stand still because of it
        silent = max(range(self._world.size), key=lambda rank: self._seen[rank].silence)
        if self._seen[silent].silence > min(self._stall, SILENCE):
            self._leave(silent, f"{self._named(silent)} has not responded for {self._seen[silent].silence:.0f} s")
        if max(seen.age for seen in self._seen) > self._stall:
            # The other ranks wait in a collective; this one is not in it, or entered one first.
            rank = max(range(self._world.size), key=lambda rank: (not self._seen[rank].inside, self._seen[rank].age))
            self._leave(rank, f"{self._named(rank)} has made no progress for {self._seen[rank].age:.0f} s")

    def _of_a_collective(self, error: BaseException) -> bool:
        """Whether this rank's error is that of a collective, which another rank has left."""
        said = words_of(error).lower()
        named = isinstance(error, dist.DistError) or "gloo" in said or "nccl" in said
        return isinstance(error, RuntimeError) and (self._world.trace.inside or named)

    def _wait_for_cause(self) -> None:
        """After a failed collective: end, if a rank has failed, or fell silent while others still publish."""
        deadline, others = time.monotonic() + PATIENCE, [n for n in range(self._world.size) if n != self._world.rank]
        while time.monotonic() < deadline:
            failed = [rank for rank in others if self._seen[rank].error]
            if failed:
                self._leave(failed[0], f"{self._named(failed[0])} failed: {self._seen[failed[0]].error}")
            silences = [seen.silence for seen in self._seen]
            if max(silences) > 4 * BEAT:
                lost = silences.index(max(silences))
                self._leave(lost, f"{self._named(lost)} has died")
            time.sleep(BEAT / 4)

    def _publish(self, error: BaseException) -> None:
        """Tell the user and the others this rank's own error, and give them time to read it and to end.

        The store may end with this rank; and where it leaves a collective of NCCL, torch aborts the others at once,
        before they can say why.
        """
        tell(error)
        self._error = " ".join(stated(error)[1].split())[:500]
        deadline = time.monotonic() + 3 * BEAT
        while time.monotonic() < deadline and not all(seen.error for seen in self._seen):
            time.sleep(BEAT / 4)
        if not all(seen.error for seen in self._seen):
            self._stopped.set()  # nothing more to ask the store, which may end now
            time.sleep(GRACE)

    def _named(self, rank: int) -> str:
        return f"rank {rank} ({self._seen[rank].place()})"

    def _leave(self, lost: int, what: str) -> None:
        """End this process; the lowest remaining rank prints why, the others wait for it."""
        end_within(PATIENCE, EXIT_LOST)  # nobody may read what it prints
        if self._world.rank == (1 if lost == 0 else 0):
            hint = "run the same command again: it continues from what is complete"
            with contextlib.suppress(OSError, ValueError):  # nothing more can be said: the status is left
                say(f"error: {' '.join(what.split())}; {hint}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * BEAT)
        os._exit(EXIT_LOST)


def _status(text: bytes) -> list[Any] | None:
    """What ``_tell`` wrote; None for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = [int, float, int, str, bool, str]
    fits = isinstance(found, list) and [type(one) for one in found] == kinds and math.isfinite(found[1])
    return [one[:1000] if isinstance(one, str) else one for one in found] if fits else None
