"""A job whose time is up, or that loses a node, goes back into the queue; one that cannot come back fails, saved."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import NODES, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("sbatch", "settings", "said"),
    [
        (
            (),
            {"MAX_ATTEMPTS": "1"},
            "failed: preempted at attempt 1 (MAX_ATTEMPTS=1), saved; next: ",
        ),
        (("--no-requeue",), {}, "failed: preempted, and not requeued: "),
    ],
    ids=["last attempt", "may not be requeued"],
)
def test_a_job_that_cannot_come_back_saves_and_fails(desk, stub, tmp_path, no_process_left, sbatch, settings, said):
    name = tmp_path.name
    job = desk.train(name, sbatch=sbatch, PYTHON=stub(), **settings)
    no_process_left(job)
    job.ready()
    desk.cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    assert job.wait(30) == "FAILED"
    assert (job.status, job.restarts) == (130, 0)
    assert "step 1/2: stopped on request, checkpoint saved" in job.text()
    assert job.last_line.startswith(said)
    assert "; next: " in job.last_line


def test_a_job_that_loses_a_node_comes_back(desk, stub, no_process_left):
    """The nodes' own daemon and the rank die at once; nobody tells the job, and Slurm does not know yet."""
    once = '[[ ! -e $RUNS/$NAME/before ]] || exit 0; touch "$RUNS/$NAME/ready.$RANK"; '
    wait = 'sleep 3; touch "$RUNS/$NAME/before"; exit 3'
    job = desk.train("node", nodes=2, SRUN_FLAGS="--wait=2", PYTHON=stub(once + wait))
    no_process_left(job)
    job.ready()
    desk.cluster.kill_node(NODES[1], job)
    try:
        wait_for(lambda: job.restarts == 1, 60, "the job to be requeued")
    finally:
        desk.cluster.start_node(NODES[1])
    assert job.wait(60) == "COMPLETED"
    before = job.text().partition("== attempt 2 of 20: ")[0].splitlines()
    assert before[-1].startswith(
        ("lost a node: nothing new to save and requeued (attempt 1 of 20)", "cancelled: Node f")
    )
    assert job.last_line.startswith("finished: train in ")


def test_preempted_before_anything_was_saved_it_comes_back_too(desk, stub, no_process_left):
    """The stages before training have no signal handler, and training none in its first seconds."""
    waiting = (
        'touch "$RUNS/$NAME/ready.0"; [[ -e $RUNS/$NAME/before ]] || { touch "$RUNS/$NAME/before"; exec sleep 600; }'
    )
    job = desk.submit("early", ONLY="sample", PYTHON=stub(waiting.replace("$RANK", "0")))
    no_process_left(job)
    job.ready(1)
    desk.cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    assert job.wait(40) == "COMPLETED"
    assert job.restarts == 1
    assert "preempted: nothing new to save and requeued (attempt 1 of 20)" in job.text().splitlines()
    assert job.last_line.startswith("finished: sample in ")
