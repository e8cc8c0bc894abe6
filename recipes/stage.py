"""Run one command of a recipe once, and record its time and memory: `stage.py STAMP [FLAGS] -- COMMAND...`

The stamp is written when the command succeeds. The stage is skipped when its stamp holds the same command, is not older
than the stamp of the stage before it, and what the command read is as it was; so an edited setting, an earlier stage
that ran again, or an edited input runs it again. Inputs are the files and folders that the command, or the JSON of its
mixture, names, which were there before it ran and which it did not change.

While it runs, no other job can run a stage of the same folder. Ctrl-C, TERM and USR1 are forwarded to the command,
which saves its state; then the stage exits with status 130.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tide import cli, scheduler
from megatron_tide.cli import Parser, run, say
from megatron_tide.files import CHOICE, STAGES, atomic_write, fingerprint, read_json, sha256_file
from megatron_tide.lock import RunLock

STOPPED = 130
HASHED = 2**30  # bytes of an input whose content is hashed; of what is larger, size and time of change are kept
LONGEST_JSON = 2**20
PRIOR = 0.05  # of a recipe's time: what the first, short stages count less than when they tell a machine's pace
NO_INPUT = (
    "--out",
    "--student-out",
    "--teacher-out",
    "--json",
    "--teacher-nvme",
    "-m",
    "--then",
)  # the word after them


def read(path: str) -> dict:
    try:
        return read_json(Path(path))
    except ValueError:
        return {}


STAMP = {"finished": float, "seconds": float, "command": list, "inputs?": {str: str}, "outputs?": [str]}


def read_stamp(path: str) -> dict:
    """What a finished stage recorded; {} where it did not finish, or the file is corrupt."""
    try:
        return read_json(Path(path), form=STAMP) if path else {}
    except ValueError:
        return {}


def inputs_of(command: list[str], stamp: Path) -> dict[str, str]:
    """Path -> fingerprint of every file and folder that a command names: it reads them, or it writes them."""
    found = {}
    holders = {str(folder) for folder in Path(os.path.realpath(stamp)).parents}  # realpath: a loop of links is no error
    for before, word in itertools.pairwise(command):
        if before in NO_INPUT:
            continue
        for text in {word, word.partition("=")[2]} - {""}:
            path = Path(text)
            if _exists(path) and os.path.realpath(path) not in holders:
                found[text] = fingerprint_of(path)
                found |= {str(named): fingerprint_of(named) for named in _named_in(path)}
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # no path at all: a word of a program
        return False


def _named_in(path: Path) -> Iterator[Path]:
    """The local sources of a mixture's JSON file."""
    if path.suffix == ".json" and path.is_file() and path.stat().st_size <= LONGEST_JSON:
        sources = read(str(path)).get("sources")
        for source in sources if isinstance(sources, list) else []:
            name = source.get("path") if isinstance(source, dict) else None
            candidates = [path.parent / name, Path(name)] if isinstance(name, str) and name else []
            yield from [one for one in candidates if _exists(one)][:1]


def _chosen_by(folder: Path) -> list[str]:
    """What a data folder's own descriptions say of the files that are read; not the scores of a README.md."""
    if (folder / "manifest.json").exists():  # prepared here: nothing is chosen
        return []
    texts = [_text_of(folder / name) for name in ("README.md", CHOICE)]
    return [*re.findall(r"^configs:.*?(?=^[^\s-]|\Z)", texts[0], re.M | re.S), *filter(None, texts[1:])]


def _text_of(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace") if path.is_file() else ""
    except OSError:  # unreadable: the command will say so
        return ""


def fingerprint_of(path: Path) -> str:
    """sha256 hex of a file, or of a folder's files by name; hidden files and a folder's README.md do not count, but for
    what they say of a data folder's files.
    """
    files = [path] if not path.is_dir() else [Path(top, name) for top, _, names in os.walk(path) for name in names]
    entries, left = [], HASHED
    for file in sorted(files):
        name = file.relative_to(path).as_posix()
        if not file.is_file() or (file != path and ("/." in f"/{name}" or name == "README.md")):
            continue
        try:
            about = file.stat()
            content = sha256_file(file) if about.st_size <= left else about.st_mtime_ns
        except OSError:  # unreadable, or gone since: the command will say so
            continue
        left -= about.st_size if about.st_size <= left else 0
        entries.append([name, about.st_size, content])
    return fingerprint([*entries, *(_chosen_by(path) if path.is_dir() else ())])


@dataclass
class Child:
    """The command, and the stop signals received so far."""

    command: list[str]
    signals: set[int] = field(default_factory=set)
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
        for number in list(self.signals):  # received before there was a process
            self._pass_on(number)
        status = self.process.wait()
        return 128 - status if status < 0 else status

    def _ask(self, number: int, frame: object) -> None:
        self.signals.add(number)
        if self.process is not None:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        assert self.process is not None
        if number == signal.SIGINT:  # a terminal sends it to the command too
            return
        self.process.send_signal(scheduler.STOP if self.is_scheduler else number)

    def was_stopped(self, status: int) -> bool:
        """Whether the command ended because of a stop signal, not because of an error."""
        if not self.signals:
            return False
        if self.is_scheduler and scheduler.stopped_by(self.signals, status):
            return True
        by_signal = {128 + number for number in self.signals}
        return status == STOPPED or status in by_signal or (self.is_torchrun and status == 1)


def place_of(stamp: Path, plan: list[str], expected: dict[str, float]) -> str:
    """``[7/14]  about 9 min left``: the stage among those of the recipe, and the time of it and of all after it.

    ``expected``: seconds of each stage where they were measured; the stages before this one tell how much faster or
    slower this machine is. Empty without a plan; no time where a stage to come is not in ``expected``.
    """
    name = stamp.stem
    if name not in plan:
        return ""
    place = plan.index(name)
    text = f"  [{place + 1}/{len(plan)}]"
    if not expected.keys() >= set(plan[place:]):
        return text
    took_each = {one: read_stamp(str(stamp.with_name(f"{one}.json"))).get("seconds") for one in plan[:place]}
    done = [one for one in plan[:place] if one in expected and took_each[one] is not None]
    took = sum(took_each[one] for one in done)
    prior = PRIOR * sum(expected.values())
    pace = (took + prior) / (sum(expected[one] for one in done) + prior)
    left = pace * sum(expected[one] for one in plan[place:])
    return f"{text}  about {f'{left / 60:.0f} min' if left >= 90 else f'{left:.0f} s'} left"


def record_plan(folder: Path, names: list[str]) -> None:
    """Keep which stages the recipe has now, beside the stamps, where others may be of earlier settings."""
    if names and read(str(folder / STAGES)).get("stages") != names:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / STAGES, json.dumps({"stages": names}).encode())


def seconds_of(text: str) -> dict[str, float]:
    """``NAME=SECONDS ...``"""
    return {name: cli.number(float, 0)(seconds) for name, _, seconds in (word.partition("=") for word in text.split())}


def main(argv: list[str]) -> int:
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamp", help="file that records the finished stage")
    parser.add_argument("--after", default="", help="stamp of the stage before this one")
    parser.add_argument("--plan", default="", help="names of all stages of the recipe, in order; (NAME): not this time")
    parser.add_argument("--expected", type=seconds_of, default={}, help="their seconds somewhere: NAME=SECONDS ...")
    parser.add_argument("--again", default="the recipe's command", help="the command that continues the recipe")
    arguments, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    name, plan = Path(arguments.stamp).stem, arguments.plan.split()
    record_plan(Path(arguments.stamp).parent, [one.strip("()") for one in plan])
    mine, before = read_stamp(arguments.stamp), read_stamp(arguments.after)
    inputs = inputs_of(command, Path(arguments.stamp))
    recorded = mine.get("inputs", {})  # an input that is gone was not edited: what was made of it stands
    changed = next((path for path, value in recorded.items() if inputs.get(path, value) != value), None)
    if mine.get("command") == command and mine.get("finished", 0) >= before.get("finished", 0) and not changed:
        gone = next((path for path in mine.get("outputs", []) if not _exists(Path(path))), None)
        advice = f" ({gone} is gone since; to make it again, remove {arguments.stamp})" if gone else ""
        say(f"== {name}: already done, skipped{advice}", flush=True)
        return 0
    place = place_of(Path(arguments.stamp), [one for one in plan if one[0] != "("], arguments.expected)
    say(f"\n== {name}{f' ({changed} changed)' if changed else ''}{place}", flush=True)
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
        say(f"stage {name}: stopped on request; to continue: {arguments.again}", flush=True)
        return STOPPED
    if status:
        say(f"error: stage {name} stopped with status {status}; to continue: {arguments.again}", file=sys.stderr)
        return status
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    after = inputs_of(command, Path(arguments.stamp))
    unchanged = {path: value for path, value in inputs.items() if after.get(path) == value}
    record = {"command": command, "finished": finished, "seconds": finished - started, "peak_process_bytes": peak}
    record["inputs"] = unchanged
    record["outputs"] = [word for word in dict.fromkeys(command[1:]) if word not in unchanged and _exists(Path(word))]
    atomic_write(Path(arguments.stamp), json.dumps(record, indent=1).encode())
    say(f"== {name}: {record['seconds']:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
