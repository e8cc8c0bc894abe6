"""A rank that dies, freezes or stands still ends the run within its time, and the log names it."""

from __future__ import annotations

import re
import signal
import subprocess

import pytest

from megatron_tide.train.watchdog import EXIT_LOST
from tests.support.launch import ranks, steps_logged, wait_until

pytestmark = pytest.mark.ranks
KNOBS = {"max_steps": 4000, "strategy": "tide-cross", "hang_timeout": 6}
STANDING = """
import sys, time
from megatron_tide import cli, distill
from megatron_tide.train import step
plain = step.global_counts
from megatron_tide.train import loop
def stands(window, world, asked):
    if world.rank == 1 and world.trace.step == 3:
        time.sleep(600)
    return plain(window, world, asked)
loop.global_counts = stands
cli.run(distill.main, sys.argv[1:])
"""


def ended_within(process, seconds):
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"a rank still hangs after {seconds} s")


@pytest.mark.parametrize(("sent", "said"), [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "has not responded for")])
def test_a_rank_that_is_killed_or_frozen(chain, tmp_path, sent, said):
    out = tmp_path / "run"
    with ranks(["-m", "megatron_tide.distill", *chain.flags(out, **KNOBS)], 2, tmp_path) as processes:
        wait_until(lambda: steps_logged(out) >= 2, processes)
        processes[1].send_signal(sent)
        ended_within(processes[0], 40)
        assert processes[0].returncode == EXIT_LOST
    printed = (tmp_path / "rank0").read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank 1 \(step \d+, (in|last collective) [a-z_]+\) " + said, line)
    assert "--resume auto" in line


def test_a_rank_that_stands_still(chain, tmp_path):
    """Its threads are well; it is the one that is in no collective, or entered one first."""
    out = tmp_path / "run"
    with ranks(["-c", STANDING, *chain.flags(out, **KNOBS)], 2, tmp_path) as processes:
        wait_until(lambda: steps_logged(out) >= 2, processes)
        ended_within(processes[0], 40)
        ended_within(processes[1], 30)  # the store that ranks tell each other through went with rank 0
        assert [process.returncode for process in processes] == [EXIT_LOST] * 2
    (line,) = [line for line in (tmp_path / "rank0").read_text().splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank 1 \(step 3, last collective [a-z_]+\) has made no progress for \d+ s", line)


def test_rank_0s_own_death_is_told_by_another(chain, tmp_path):
    out = tmp_path / "run"
    with ranks(["-m", "megatron_tide.distill", *chain.flags(out, **KNOBS)], 2, tmp_path) as processes:
        wait_until(lambda: steps_logged(out) >= 2, processes)
        processes[0].kill()
        ended_within(processes[1], 40)
        assert processes[1].returncode == EXIT_LOST
    assert "error: " in (tmp_path / "rank1").read_text()
