"""One cluster and one whole run for all tests of this folder, and how to submit to it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job, missing_programs, wait_for
from tests.support.chain import Chain, build_chain, conversations, tiny_configs

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = "slurm/distill_16b_to_0.6b.sh"
STEPS = 40
TRAINING = ["--precision", "fp32", "--teacher-dtype", "fp32", "--global-batch-size", "4", "--micro-batch-size", "1"]
TRAINING += ["--log-every", "1", "--save-every", "1000", "--skip-teacher-probe"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"NOT TESTED with Slurm: {missing[0]} is not installed (slurmctld slurmd slurm-client munge)")
    with Cluster() as started:
        yield started


@dataclass(frozen=True)
class Desk:
    """Where jobs are submitted: tiny models, runs below ``runs``."""

    cluster: Cluster
    chain: Chain
    runs: Path

    def settings(self, name: str, **more: str) -> dict[str, str]:
        root = self.chain.root
        models = {
            "TEACHER": str(root / "teacher"),
            "STUDENT": str(root / "student"),
            "DATA": str(root / "corpus.jsonl"),
        }
        sizes = {"STUDENT_LENGTH": "96", "TEACHER_LENGTH": "96", "OMP_NUM_THREADS": "1"}
        return {**models, **sizes, "PYTHON": sys.executable, "RUNS": str(self.runs), "NAME": name, **more}

    def options(self, nodes: int) -> list[str]:
        """Two ranks, on one node or on two."""
        ranks = f"--ntasks-per-node={2 // nodes}"
        small = ["--cpus-per-task=2", "--mem=4G", f"--output={self.runs}/%j.out"]
        return [f"--nodes={nodes}", ranks, "--gpus-per-node=2", *small]

    def submit(self, name: str, *flags: str, nodes: int = 1, sbatch: tuple[str, ...] = (), **settings: str) -> Job:
        """The whole recipe as a job, on two ranks."""
        line = ["sbatch", "--parsable", *self.options(nodes), *sbatch, SCRIPT, *TRAINING, *flags]
        number = self.cluster.call(*line, cwd=REPOSITORY, env=self.settings(name, **settings)).stdout.strip()
        return Job(self.cluster, number, self.runs / name / "logs")

    def train(self, name: str, *flags: str, **options) -> Job:
        """The training alone, on what the chain has prepared."""
        run = self.runs / name
        run.mkdir()
        for part in ("bridge", "data"):
            (run / part).symlink_to(self.chain.root / part)
        return self.submit(name, *flags, **{"ONLY": "train", **options})

    def after_the_first_step(self, name: str) -> None:
        metrics = self.runs / name / "tide-cross" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text(), 120, f"the first step of {name}")

    def saved(self, name: str) -> list[int]:
        """The steps of a run's checkpoints."""
        folders = sorted((self.runs / name / "tide-cross").glob("step-*"))
        return [json.loads((folder / "trainer.json").read_text())["state"]["step"] for folder in folders]


@pytest.fixture(scope="session")
def desk(cluster: Cluster, tmp_path_factory) -> Desk:
    chain = build_chain(tmp_path_factory.mktemp("models"), conversations(48), *tiny_configs(), 32, (96, 96))
    return Desk(cluster, chain, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def whole(desk: Desk) -> Job:
    """The whole recipe as one job on two nodes, which nothing disturbed; run "whole" of the desk."""
    job = desk.submit("whole", "--max-steps", str(STEPS), nodes=2)
    assert job.wait(200) == "COMPLETED", job.text()
    return job


@pytest.fixture
def no_process_left() -> Iterator[Callable[[Job], None]]:
    """Call it with a job: when the test ends, no process of it may be alive."""
    jobs: list[Job] = []
    yield jobs.append
    for job in jobs:
        wait_for(lambda job=job: not job.processes(), 15, f"the end of every process of job {job.number}")


STUB = """#!/usr/bin/env bash
case "$*" in
  *--dry-run*) exit 0 ;;
  "-m megatron_tide."* | "-m megatron_tide sample "*) echo "trained by $RANK" ;;
  *) exec {python} "$@" ;;
esac
{after}
"""
WAITING = """
end() { echo 'step 1/2: stopped on request, checkpoint saved'; exit 130; }
trap end USR1 TERM
touch "$RUNS/$NAME/ready.$RANK"
for ((i = 0; i < 9000; i++)); do sleep 0.1; done
"""


@pytest.fixture
def stub(tmp_path: Path) -> Callable[[str], str]:
    """``stub(shell lines)``: a PYTHON whose ranks run those lines in place of a training; everything else is real."""

    def write(after: str = WAITING) -> str:
        path = tmp_path / "python"
        path.write_text(STUB.replace("{python}", sys.executable).replace("{after}", after))
        path.chmod(0o755)
        return str(path)

    return write
