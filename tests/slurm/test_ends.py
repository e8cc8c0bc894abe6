"""However a job ends, it ends: soon, not with 0, with one line that says why, and with no process left behind."""

from __future__ import annotations

import os
import shlex
import signal

import pytest

from tests.slurm.cluster import NODES, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(1200)]
LONG = ("--max-steps", "4000")


def test_cancelled_it_saves(desk, stub, no_process_left):
    job = desk.train("cancelled", nodes=2, PYTHON=stub())
    no_process_left(job)
    job.ready()
    desk.cluster.call("scancel", job.number)
    assert job.wait(30) == "CANCELLED"
    wait_for(lambda: "cancelled: " in job.text(), 20, "the last line")  # the job is cancelled before its script ends
    said, _, again = job.last_line.partition("; next: ")
    assert said == "cancelled: saved"
    words = shlex.split(again.removesuffix(" (or wait, if Slurm itself requeues it)"))
    assert "NAME=cancelled" in words[: words.index("sbatch")]
    assert "--nodes=2" in words
    assert " slurm/distill_16b_to_0.6b.sh --precision fp32 " in again
    wait_for(lambda: job.status != 0, 20, "a status that is not 0")
    said = "step 1/2: stopped on request, checkpoint saved"
    assert [job.text(rank).splitlines()[-1] for rank in (0, 1)] == [said] * 2
    assert job.restarts == 0


def test_a_rank_that_is_killed_ends_the_job(desk, no_process_left):
    job = desk.train("killed", *LONG, nodes=2)
    no_process_left(job)
    desk.after_the_first_step("killed")
    os.kill(job.rank(1), signal.SIGKILL)
    assert job.wait(60) == "FAILED"
    assert (job.status, job.restarts) == (137, 0)
    assert job.last_line.startswith(f"failed: rank 1 was killed ({NODES[1]}: task 1: Killed): ")


def test_a_rank_that_hears_nothing_of_it_goes_too(desk, stub, no_process_left):
    """srun ends the others a while after the first that left, whatever they wait for: here 5 s, not 30."""
    job = desk.train(
        "deaf", SRUN_FLAGS="--wait=5", PYTHON=stub("((RANK == 1)) || { trap '' TERM USR1; sleep 900 & wait; }; exit 7")
    )
    no_process_left(job)
    assert job.wait(25) == "FAILED"
    assert job.status != 0
    assert job.last_line.startswith("failed: ")


def test_a_node_that_fails_ends_the_job(desk, no_process_left):
    job = desk.train("lost", *LONG, nodes=2, sbatch=("--no-requeue",))
    no_process_left(job)
    desk.after_the_first_step("lost")
    desk.cluster.kill_node(NODES[1], job)
    try:
        state = job.wait(60)
        # Slurm notices, or the job does.
        assert state == "NODE_FAIL" or (state == "FAILED" and job.status != 0)
        wait_for(lambda: not job.processes(), 60, "the end of every process")
        # Slurm notices, or the job itself does, or Slurm ends it while it asks: then the rank is all it can name.
        known = ("cancelled: ", "failed: lost a node, and not requeued: ", "failed: rank 1 (")
        assert job.last_line.startswith(known)
        assert "; next: " in job.last_line
    finally:
        desk.cluster.start_node(NODES[1])
    wait_for(lambda: desk.cluster.idle_nodes() == len(NODES), 30, "the node to come back")


@pytest.mark.parametrize(
    ("flags", "settings", "reason"),
    [
        (("--lr", "-3"), {"ONLY": "train"}, "--lr -3.0: must be between 0 and 1"),
        (LONG, {"DATA": "no-such.jsonl"}, "no-such.jsonl"),
    ],
    ids=["flag", "data"],
)
def test_a_failure_is_named_and_not_requeued(desk, tmp_path, flags, settings, reason):
    job = desk.submit(f"failed-{tmp_path.name}", *flags, **settings)
    assert job.wait(60) == "FAILED"
    assert (job.status, job.restarts) == (2, 0)
    assert job.last_line.startswith("failed: ")
    assert reason in job.last_line
    before, _, after = job.last_line.partition("; next: fix that, then ")[2].partition("sbatch ")
    assert f"NAME=failed-{tmp_path.name} " in before
    assert "slurm/distill_16b_to_0.6b.sh" in after


@pytest.mark.parametrize(
    ("printed", "reason"),
    [("error: no room for me", "no room for me"), ("torch.OutOfMemoryError: CUDA", "torch.OutOfMemoryError: CUDA")],
)
def test_what_one_rank_alone_said_is_in_the_last_line(desk, stub, tmp_path, no_process_left, printed, reason):
    lines = f"((RANK == 0)) && {{ sleep 2; echo 'RuntimeError: Connection closed by peer'; exit 1; }}; echo {printed!r}"
    job = desk.train(tmp_path.name, nodes=2, PYTHON=stub(f"{lines}; exit 3"))
    no_process_left(job)
    assert job.wait(60) == "FAILED"
    assert job.status == 3
    assert job.last_line.startswith(f"failed: {reason} (rank 1); next: ")
