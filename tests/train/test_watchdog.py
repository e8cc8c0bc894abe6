"""A rank that dies, freezes or stands still ends the run within its time, and the log names it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import time

import pytest
import torch

from megatron_tide import distill
from megatron_tide.ds_ops import ops_folder
from megatron_tide.train import distributed, loop, watchdog
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.watchdog import EXIT_LOST, HangWatchdog
from tests.support.launch import ranks, run_command, steps_logged, wait_until
from tests.test_screen import Panic

pytestmark = pytest.mark.ranks
BASE_FLAGS = {"max_steps": 4000, "strategy": "tide-cross", "hang_timeout": 6}


def stands_still(argv):
    """Training whose rank 1 sleeps in step 3."""
    plain = loop.global_counts

    def stands(microbatches, world, asked):
        if world.rank == 1 and world.trace.step == 3:
            time.sleep(600)
        return plain(microbatches, world, asked)

    loop.global_counts = stands
    return distill.main(argv)


def ended_within(process, seconds):
    process.join(seconds)
    assert process.exitcode is not None, f"a rank still hangs after {seconds} s"


@pytest.mark.parametrize(
    ("lost", "sent", "said"),
    [
        (1, signal.SIGKILL, r"rank 1 \(.*\) has died"),
        (1, signal.SIGSTOP, r"rank 1 \(.*\) has not responded for"),
        (0, signal.SIGKILL, r"rank 0 (\(.*\) has died|has exited)"),  # and the store with it
        (0, signal.SIGSTOP, r"rank 0 \(.*\) has not responded for"),
    ],
)
def test_a_rank_that_is_killed_or_frozen(chain, tmp_path, lost, sent, said):
    out, other = tmp_path / "run", 1 - lost
    with ranks(distill.main, chain.flags(out, **BASE_FLAGS), 2, tmp_path) as processes:
        wait_until(lambda: steps_logged(out) >= 20, processes)
        os.kill(processes[lost].pid, sent)
        ended_within(processes[other], 40)
        assert processes[other].exitcode == EXIT_LOST
    printed = (tmp_path / f"rank{other}").read_text()
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.match("error: " + said, line)
    assert "run the same command again" in line


def test_a_rank_that_stands_still(chain, tmp_path):
    """Its threads are well; it is the one that is in no collective, or entered one first."""
    out = tmp_path / "run"
    with ranks(stands_still, chain.flags(out, **BASE_FLAGS), 2, tmp_path) as processes:
        wait_until(lambda: steps_logged(out) >= 2, processes)
        ended_within(processes[0], 40)
        ended_within(processes[1], 30)  # the store that ranks tell each other through went with rank 0
        assert [process.exitcode for process in processes] == [EXIT_LOST] * 2
    (line,) = [line for line in (tmp_path / "rank0").read_text().splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank 1 \(step 3, last collective [a-z_]+\) has made no progress for \d+ s", line)


def fails_alone(argv):
    """Training whose rank 1 has an error of its own in step 3; before that, it spoils what it published.

    Leaving the group waits for the other ranks, as NCCL's does.
    """
    plain = loop.global_counts
    torch.distributed.destroy_process_group = lambda *_: time.sleep(600)

    def fails(microbatches, world, asked):
        if world.rank == 1 and world.trace.step == 3:
            store = HangWatchdog._connect()
            for text in ("no JSON", "[]", "3", '["a", 1, 2]', '[9, 1e999, 3, "a", true, ""]', b"\xff\xfe"):
                store.set("watch/1", text)
                time.sleep(0.5)
            raise Panic("out of memory on this card")  # of a library in Rust: no Exception
        return plain(microbatches, world, asked)

    loop.global_counts = fails
    return distill.main(argv)


def test_an_error_of_one_rank_reaches_the_user(chain, tmp_path):
    out = tmp_path / "run"
    with ranks(fails_alone, chain.flags(out, **BASE_FLAGS), 2, tmp_path) as processes:
        ended_within(processes[0], 60)
        ended_within(processes[1], 10)
        assert [process.exitcode for process in processes] == [EXIT_LOST, 1]
    (line,) = [line for line in (tmp_path / "rank0").read_text().splitlines() if line.startswith("error: ")]
    assert re.match(r"error: rank 1 \(step 3, .*\) failed: Panic: out of memory on this card; ", line)
    own = (tmp_path / "rank1").read_text()
    assert own.count("Traceback (most recent call last)") == own.count("Panic: out of memory") == 1


def joins(argv):
    """A group that rank 1 never joins; ``argv``: the folder of DeepSpeed's ops."""
    distributed.NOTICE = 1
    os.environ["TORCH_EXTENSIONS_DIR"] = argv[0]
    if os.environ["RANK"] == "1":
        time.sleep(600)
    distributed.init_distributed()
    return 0


def test_a_rank_says_that_others_do_not_come(tmp_path):
    said = "rank 0 of 2 waits for the others at 127.0.0.1, port "
    with ranks(joins, [str(ops_folder())], 2, tmp_path) as processes:
        wait_until(lambda: (tmp_path / "rank0").exists() and said in (tmp_path / "rank0").read_text(), processes)


@pytest.mark.skipif(not [*ops_folder().glob("deepspeed_shm_comm/*.so")], reason="set-up has compiled no ops")
def test_a_lock_that_a_killed_process_left_does_not_stop_all_later_ones(tmp_path):
    """DeepSpeed takes one while it loads an op, as every group does on a CPU."""
    ops = shutil.copytree(ops_folder(), tmp_path / "ops")
    lock = ops / "deepspeed_shm_comm" / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    assert run_command(joins, [ops], tmp_path).status == 0


def leaves_unread(argv):
    """A rank that tells of a lost one where nobody reads: its standard error is a full pipe."""
    _, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writing, b" " * 4096):
            pass
    os.set_blocking(writing, True)
    os.dup2(writing, 2)
    watchdog.PATIENCE = 1
    HangWatchdog(DistContext(0, 2, torch.device("cpu"), None), 6)._leave(1, "rank 1 has died")


def test_a_rank_ends_also_where_nobody_reads_what_it_says(tmp_path):
    with ranks(leaves_unread, [], 1, tmp_path) as (process,):
        ended_within(process, 30)
        assert process.exitcode == EXIT_LOST
