"""The whole recipe as one job, as one that is preempted, and as three that wait for each other."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.slurm.cluster import Job
from tests.slurm.conftest import REPOSITORY, STEPS, TRAINING

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(1200)]
RELEASE = {"config.json", "model.safetensors", "README.md", "parity.json"}


def test_one_job_on_two_nodes(desk, whole, no_process_left):
    no_process_left(whole)
    assert (whole.status, whole.restarts) == (0, 0)
    assert whole.last_line.startswith(f"finished: {desk.runs}/whole/hf; next: ")
    assert {path.name for path in (desk.runs / "whole" / "hf").iterdir()} >= RELEASE
    assert (desk.runs / f"{whole.number}.out").read_text() == f"everything is in {whole.logs}/{whole.number}.log\n"
    for rank in (0, 1):
        assert whole.text(rank).startswith(f"== attempt 1: rank {rank} of 2 on 127.0.0.1{1 + rank}\n")
    for text in (whole.text(rank=0), whole.text()):
        assert f"step {STEPS}/{STEPS}: finished" in text


def tensors(desk, name):
    folder = desk.runs / name / "tide-cross" / f"step-{STEPS:08d}"
    files = ("model", "exp_avg", "exp_avg_sq")
    return {
        f"{file}/{key}": value for file in files for key, value in load_file(folder / f"{file}.safetensors").items()
    }


@pytest.mark.parametrize("nodes", [1, 2])
def test_preempted_requeued_and_resumed_is_bit_for_bit(desk, whole, nodes, no_process_left):
    """Its time is up, it saves, goes back into the queue, and ends with the numbers of one that nobody touched."""
    name = f"preempted-{nodes}"
    for part in ("bridge", "data"):
        (desk.runs / name).mkdir(exist_ok=True)
        (desk.runs / name / part).symlink_to(desk.runs / "whole" / part)
    job = desk.submit(name, "--max-steps", str(STEPS), nodes=nodes, ONLY="train")
    no_process_left(job)
    desk.after_the_first_step(name)
    desk.cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    assert job.wait(150) == "COMPLETED"
    assert job.restarts == 1
    lines = job.text().splitlines()
    assert lines.count("preempted: saved and requeued (attempt 1 of 20)") == 1
    assert sum(line.startswith("== attempt 2 of 20: ") for line in lines) == 1
    resumed = next(line for line in lines if line.startswith("resuming from "))
    assert 1 <= int(resumed.rpartition("step ")[2].split("/")[0]) < STEPS
    assert lines[-1].startswith("finished: train in ")
    ours, theirs = tensors(desk, name), tensors(desk, "whole")
    assert ours.keys() == theirs.keys()
    assert len(ours) > 30
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_three_jobs_with_two_ranks_on_one_node(desk, no_process_left):
    small = "--cpus-per-task=2 --mem=4G"
    more = {"PREPARE_SBATCH": small, "CONVERT_SBATCH": small, "DISTIL_SBATCH": " ".join(desk.options(1))}
    more["EVAL_DATA"] = str(desk.chain.root / "data")
    line = ("bash", "slurm/chain.sh", "distill_16b_to_0.6b", *TRAINING, "--max-steps", "3")
    environment = {**desk.settings("three", **more), "SBATCH_OUTPUT": f"{desk.runs}/%j.out"}
    said = desk.cluster.call(*line, cwd=REPOSITORY, env=environment).stdout
    numbers = re.fullmatch(r"prepare (\d+), distil (\d+), convert (\d+)", said.splitlines()[0]).groups()
    jobs = [Job(desk.cluster, number, desk.runs / "three" / "logs") for number in numbers]
    for job in jobs:
        no_process_left(job)
        assert job.wait(150) == "COMPLETED"
    assert [job.last_line.split(":")[0] for job in jobs] == ["finished"] * 3
    # Without the options of a job that needs no GPU, and with all stages that are left.
    assert " sbatch slurm/distill_16b_to_0.6b.sh " in jobs[0].last_line
    assert "ONLY" not in jobs[0].last_line
    assert 'next: ONLY="convert evaluate report" ' in jobs[1].last_line
    assert "== train" not in jobs[0].text()
    assert "== data" not in jobs[1].text()
    assert "rank 1 of 2 on 127.0.0.11" in jobs[1].text(rank=1)
    assert {path.name for path in (desk.runs / "three" / "hf").iterdir()} >= RELEASE
    assert len(json.loads((desk.runs / "three" / "scores.json").read_text())) > 0


def test_what_waits_for_a_job_that_failed_is_taken_back(desk):
    first = desk.submit("in-vain", DATA="no-such.jsonl", ONLY="sample")
    after = (f"--dependency=afterok:{first.number}", "--kill-on-invalid-dep=yes")
    second = desk.submit("in-vain", sbatch=after, ONLY="train")
    assert first.wait(60) == "FAILED"
    assert second.wait(30) == "CANCELLED"
