"""The whole recipe as one job, and as three that wait for each other."""

from __future__ import annotations

import json
import re

import pytest

from tests.slurm.cluster import Job
from tests.slurm.conftest import REPOSITORY, STEPS, TRAINING

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.timeout(280)]
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
