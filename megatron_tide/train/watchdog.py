"""End the run when a rank dies or hangs, instead of leaving the others in a collective forever.

Each rank publishes its activity and its time in the process group's store. A thread on each rank watches all of them:

    silent    a rank publishes nothing new: its process is dead or frozen, or its node is lost
    hanging   a rank publishes that it makes no progress

After --hang-timeout seconds of either, or at once when a collective fails and a rank is silent, the remaining ranks
report that rank, its step and its last collective, and exit with status EXIT_LOST.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

from megatron_tide.cli import say
from megatron_tide.train.distributed import DistContext

EXIT_LOST = 3
BEAT = 1.0
PATIENCE = 10.0  # seconds to find the cause of a failed collective


@dataclass
class RankStatus:
    """A rank's last published activity, and when it last changed."""

    beat: int = -1
    since: float = 0.0
    age: float = 0.0
    step: int = 0
    collective: str = "none yet"
    inside: bool = False

    @property
    def silence(self) -> float:
        return time.monotonic() - self.since

    def place(self) -> str:
        return f"step {self.step}, {'in' if self.inside else 'last collective'} {self.collective}"


class HangWatchdog:
    """``with HangWatchdog(world, seconds):`` does nothing for a single rank."""

    def __init__(self, world: DistContext, hang_timeout: float) -> None:
        self._world, self._stall = world, hang_timeout
        self._stopped = threading.Event()
        self._seen = [RankStatus(since=time.monotonic()) for _ in range(world.size)]
        self._thread = threading.Thread(target=self._run, daemon=True, name="watchdog")

    def __enter__(self) -> HangWatchdog:
        if self._world.size > 1:
            self._store = self._connect()
            self._tell(0)
            self._world.sum_over_ranks([0.0])  # every rank has published its status
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and self._thread.is_alive():
            lost = self._wait_for_silence()
            if lost is not None:
                self._leave(lost, f"{self._named(lost)} has died")
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    @staticmethod
    def _connect() -> dist.TCPStore:
        """A separate connection: the group's own blocks while a collective is being set up."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, wait_for_workers=False)

    def _tell(self, beat: int) -> None:
        trace = self._world.trace
        status = [beat, trace.age, trace.step, trace.collective, trace.inside]
        self._store.set(f"watch/{self._world.rank}", json.dumps(status))

    def _run(self) -> None:
        beat = 0
        while not self._stopped.wait(BEAT):
            beat += 1
            try:
                self._tell(beat)
                published = self._store.multi_get([f"watch/{rank}" for rank in range(self._world.size)])
            except RuntimeError:  # the store is on rank 0's node
                if not self._stopped.wait(PATIENCE):
                    self._leave(0, "rank 0 has exited, or its node does not respond")
                return
            for seen, text in zip(self._seen, published):
                number, *rest = json.loads(text)
                if number != seen.beat:
                    seen.beat, seen.since = number, time.monotonic()
                    seen.age, seen.step, seen.collective, seen.inside = rest
            self._judge()

    def _judge(self) -> None:
        silent = max(range(self._world.size), key=lambda rank: self._seen[rank].silence)
        if self._seen[silent].silence > self._stall:
            self._leave(silent, f"{self._named(silent)} has not responded for {self._seen[silent].silence:.0f} s")
        if max(seen.age for seen in self._seen) > self._stall:
            # The other ranks wait in a collective; this one is not in it, or entered one first.
            rank = max(range(self._world.size), key=lambda rank: (not self._seen[rank].inside, self._seen[rank].age))
            self._leave(rank, f"{self._named(rank)} has made no progress for {self._seen[rank].age:.0f} s")

    def _wait_for_silence(self) -> int | None:
        """After a failed collective: the rank that fell silent while others still publish; None if none did."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            silences = [seen.silence for seen in self._seen]
            if max(silences) > 4 * BEAT:
                return silences.index(max(silences))
            time.sleep(BEAT / 4)
        return None

    def _named(self, rank: int) -> str:
        return f"rank {rank} ({self._seen[rank].place()})"

    def _leave(self, lost: int, what: str) -> None:
        """End this process; the lowest remaining rank prints why, the others wait for it."""
        if self._world.rank == (1 if lost == 0 else 0):
            hint = "run the same command again: --resume auto continues from the newest complete checkpoint"
            say(f"error: {what}; {hint}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * BEAT)
        os._exit(EXIT_LOST)
