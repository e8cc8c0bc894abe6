"""Run one command of a recipe once, and keep what it took: `stage.py STAMP [--after STAMP] -- COMMAND...`

The stamp is written when the command succeeds. The stage is skipped when its stamp holds the same command and is not
older than the stamp of the stage before it; so an edited setting, or an earlier stage that ran again, runs it again.

While it runs, no other job may run a stage of the same folder. Asked to stop (Ctrl-C, TERM, USR1), it asks the command
likewise, gives it its time to save, and leaves with 130.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tide import scheduler
from megatron_tide.cli import say
from megatron_tide.lock import RunLock

STOPPED = 130


def read(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


@dataclass
class Child:
    """The command, and which signals it was asked to stop with."""

    command: list[str]
    asked: set[int] = field(default_factory=set)
    process: subprocess.Popen | None = None

    @property
    def is_scheduler(self) -> bool:
        return scheduler.starts_ranks(self.command)

    @property
    def is_torchrun(self) -> bool:
        return "torch.distributed.run" in self.command

    def run(self) -> int:
        """The command's status as a shell counts it."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)
        self.process = subprocess.Popen(self.command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        for number in list(self.asked):  # asked before there was a process
            self._pass_on(number)
        status = self.process.wait()
        return 128 - status if status < 0 else status

    def _ask(self, number: int, frame: object) -> None:
        self.asked.add(number)
        if self.process is not None:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        assert self.process is not None
        if number == signal.SIGINT:  # a terminal sends it to the command too
            return
        self.process.send_signal(scheduler.STOP if self.is_scheduler else number)

    def was_stopped(self, status: int) -> bool:
        """Whether it ended because it was asked to, rather than for a reason of its own."""
        if not self.asked:
            return False
        if self.is_scheduler and scheduler.gave_up(self.asked, status):
            return True
        by_signal = {128 + number for number in self.asked}
        return status == STOPPED or status in by_signal or (self.is_torchrun and status == 1)


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamp", help="file that records the finished stage")
    parser.add_argument("--after", default="", help="stamp of the stage before this one")
    arguments, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    name = Path(arguments.stamp).stem
    mine, before = read(arguments.stamp), read(arguments.after) if arguments.after else {}
    if mine.get("command") == command and mine.get("finished", 0) >= before.get("finished", 0):
        say(f"== {name}: done before, skipped", flush=True)
        return 0
    say(f"\n== {name}", flush=True)
    started = time.time()
    child = Child(command)
    try:
        with RunLock(Path(arguments.stamp).parent):
            status = child.run()
    except ValueError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    finished = time.time()
    if child.was_stopped(status):
        say(f"stage {name}: stopped as asked; run the same recipe again to go on", flush=True)
        return STOPPED
    if status:
        say(f"error: stage {name} stopped with status {status}; run the same recipe again to go on", file=sys.stderr)
        return status
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record = {"command": command, "finished": finished, "seconds": finished - started, "peak_process_bytes": peak}
    Path(arguments.stamp).write_text(json.dumps(record, indent=1))
    say(f"== {name}: {record['seconds']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
