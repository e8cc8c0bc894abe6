"""A signal ends a command with 128 + its number and one line, and nothing temporary stays."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from megatron_tide.files import AtomicFolder, replacing
from megatron_tide.lock import RunLock
from megatron_tide.workers import workers
from tests.support.launch import ranks, wait_until


def writes(argv):
    """A command in the middle of everything that is temporary."""
    out = Path(argv[0])
    tempfile.tempdir = argv[0]
    with RunLock(out), tempfile.TemporaryDirectory(), AtomicFolder(out / "folder"), replacing(out / "file"):
        (out / "up").touch()
        time.sleep(600)


def work(folder):
    print("\x1b]0;title\x07", file=sys.stderr, flush=True)
    (Path(folder) / f"worker-{os.getpid()}").touch()
    time.sleep(600)


def lets_work(argv):
    with workers(2) as pool:
        found = [pool.submit(work, argv[0]) for _ in range(2)]
        found[0].result()


def ended(main, tmp_path, number, times, ready):
    """Status and words of a command that got a signal when ``ready(its folder)``, and what is left."""
    out = tmp_path / "out"
    out.mkdir()
    with ranks(main, [str(out)], 1, tmp_path) as (process,):
        wait_until(lambda: ready(out), [process])
        for _ in range(times):
            os.kill(process.pid, number)
        process.join(60)
        return process.exitcode, (tmp_path / "rank0").read_text(), sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize(
    ("number", "times", "said"),
    [
        (signal.SIGINT, 1, "interrupted\n"),
        (signal.SIGTERM, 1, "ended by SIGTERM\n"),
        (signal.SIGTERM, 50, "ended by SIGTERM\n"),  # as `timeout` does, to the process and to its group
        (signal.SIGHUP, 1, "ended by SIGHUP\n"),
    ],
)
def test_nothing_temporary_stays(tmp_path, number, times, said):
    found = ended(writes, tmp_path, number, times, lambda out: (out / "up").exists())
    assert found == (128 + number, said, ["up"])


def test_workers_end_with_the_command(tmp_path):
    status, said, left = ended(lets_work, tmp_path, signal.SIGTERM, 1, lambda out: len([*out.glob("worker-*")]) == 2)
    assert status == 143
    assert said == "\\x1b]0;title\\x07\n" * 2 + "ended by SIGTERM\n"  # what workers print is clean too
    for name in left:
        assert not Path("/proc", name.removeprefix("worker-")).exists()
