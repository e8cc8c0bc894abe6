"""The scripts themselves: read by bash, by shellcheck and by Slurm; refusals are one line that says the fix."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = ("distill_16b_to_0.6b", "distill_8b_to_0.6b", "distill_ar_to_0.6b", "adapt_ar_to_bd3lm", "on_policy")
JOBS = tuple(f"slurm/{name}.sh" for name in RECIPES)
SCRIPTS = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("[rs]*/*.sh") if path.is_file())


def run(*line, folder=REPOSITORY, **environment):
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "ONLY", "PYTHON"))
    }
    return subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=240, env={**clean, **environment}, check=False
    )


def options(script):
    """The names and values of its #SBATCH lines."""
    lines = (REPOSITORY / script).read_text().splitlines()
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", "\n".join(lines), flags=re.M))


def test_all_scripts_are_looked_at():
    assert {*JOBS, "slurm/chain.sh", "slurm/job.sh", "slurm/rank.sh", "recipes/common.sh"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script):
    read = run("bash", "-n", script)
    assert read.returncode == 0, read.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if checker is None:
        pytest.skip("NOT TESTED: shellcheck is not installed")
    checked = run(checker, "-x", script)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", JOBS)
def test_every_option_is_read_and_explained(script):
    lines = (REPOSITORY / script).read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    assert not any("SBATCH" in line for line in lines[first_command:]), "Slurm stops reading at the first command"
    assert sum(line.startswith("#SBATCH") for line in lines) == len(options(script))
    given = options(script)
    assert given["signal"].startswith("B:USR1@")
    assert given["ntasks-per-node"] == given["gpus-per-node"]
    assert given["open-mode"] == "append"
    assert "requeue" in given
    assert given["job-name"] == Path(script).stem


@pytest.mark.parametrize("script", JOBS)
def test_no_training_flag_is_set_here(script):
    calls = [line for line in (REPOSITORY / script).read_text().splitlines() if line.startswith("job ")]
    assert calls == [f'job recipes/{Path(script).name} "$@"']
    assert f"NAME=${{NAME:-{Path(script).stem}}}" in (REPOSITORY / "recipes" / Path(script).name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", JOBS)
def test_slurm_would_take_it(cluster, script):
    cluster.call("sbatch", "--test-only", script, cwd=REPOSITORY)
    refused = cluster.call("sbatch", "--test-only", "--gpus-per-node=9", script, cwd=REPOSITORY, check=False)
    assert refused.returncode != 0, "this cluster takes everything, so the line above says nothing"


def test_elsewhere_it_says_where_to_submit_it(tmp_path):
    refused = run("bash", str(REPOSITORY / JOBS[0]), folder=tmp_path, SLURM_SUBMIT_DIR=str(tmp_path), SLURM_JOB_ID="1")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        f"error: no slurm/job.sh in {tmp_path}; submit from the repository: cd REPOSITORY && sbatch {JOBS[0]}"
    ]


def test_without_slurm_it_names_both_ways():
    refused = run("bash", JOBS[0], "--lr", "1e-4")
    assert refused.returncode == 2
    expected = f"failed: not in a Slurm job; next: sbatch {JOBS[0]} --lr 1e-4, or without Slurm: bash recipes/"
    assert refused.stdout.startswith(expected)
    assert len(refused.stdout.splitlines()) == 1


def test_the_command_that_goes_on_is_whole():
    """What of the environment and of sbatch's options makes this run, quoted; and not what the script says itself."""
    settings = {"NAME": "my run", "TEACHER": "/a b", "ONLY": "train convert", "DRY_RUN": "0", "OMP_NUM_THREADS": "1"}
    settings["SRUN_FLAGS"] = "--container-image=/a.sqsh"
    given = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_PER_NODE": "8"}
    given |= {"SLURM_MEM_PER_NODE": "8192", "SLURM_JOB_RESERVATION": "ours"}
    given |= {"SLURM_JOB_PARTITION": "big", "SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "4600"}
    refused = run("bash", JOBS[0], "--lr", "1e-4", "--name", "a b", **settings, **given)
    again = refused.stdout.partition("; next: ")[2].partition(", or without Slurm")[0]
    assert shlex.split(again) == [
        *("NAME=my run", "SRUN_FLAGS=--container-image=/a.sqsh", "TEACHER=/a b", "ONLY=train convert", "sbatch"),
        *("--nodes=2", "--ntasks-per-node=4", "--mem=8192", "--partition=big", "--reservation=ours", "--time=60"),
        *(JOBS[0], "--lr", "1e-4", "--name", "a b"),
    ]
    # Of a setting whose default is no empty word, an empty one is another run; the script's own memory is none.
    script = next(job for job in JOBS if "adapt" in str(job))
    refused = run("bash", script, PRETRAINING="", NOISE="--mask-count exact", SLURM_MEM_PER_NODE=str(200 * 1024))
    again = refused.stdout.partition("; next: ")[2].partition(", or without Slurm")[0]
    assert shlex.split(again) == ["NOISE=--mask-count exact", "PRETRAINING=", "sbatch", str(script)]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_NTASKS_PER_NODE": ""}, "number of ranks per node unknown; next: sbatch --ntasks-per-node=8 ..."),
        (
            {"SLURM_GPUS_ON_NODE": "4"},
            "8 ranks but 4 GPUs per node; next: sbatch --ntasks-per-node=4 --gpus-per-node=4 ...",
        ),
        ({"MAX_ATTEMPTS": "many"}, "MAX_ATTEMPTS=many: must be a positive integer; next: set one, or unset it"),
        ({"PROLOGUE": "no/such.sh"}, f"PROLOGUE=no/such.sh: no such file (from {REPOSITORY})"),
    ],
)
def test_a_mistake_in_the_allocation_is_the_last_line(tmp_path, environment, said):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "8"}
    refused = run("bash", JOBS[0], **{**job, "RUNS": str(tmp_path), "NAME": "run", **environment})
    assert refused.returncode == 2
    assert refused.stdout.strip() == f"everything is in {tmp_path}/run/logs/7.log"
    assert (tmp_path / "run" / "logs" / "7.log").read_text().splitlines()[-1] == f"failed: {said}"


def test_a_prologue_that_ends_the_script_is_told_too(tmp_path):
    (tmp_path / "mine.sh").write_text("exit 5\n")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", "RUNS": str(tmp_path), "NAME": "run"}
    ended = run("bash", JOBS[0], PROLOGUE=str(tmp_path / "mine.sh"), **job)
    assert ended.returncode == 5
    assert (tmp_path / "run" / "logs" / "7.log").read_text().splitlines()[1:] == [
        f"failed: the job script stopped with status 5; next: fix the error above, then "
        f"NAME=run PROLOGUE={tmp_path}/mine.sh RUNS={tmp_path} sbatch {JOBS[0]}"
    ]


def test_chain_submits_three_jobs_each_after_the_other():
    more = {"PREPARE_SBATCH": "--partition=cpu", "DISTIL_SBATCH": "--nodes=4", "EVAL_DATA": str(REPOSITORY / "tests")}
    shown = run("bash", "slurm/chain.sh", "distill_16b_to_0.6b", "--lr", "1e-4", DRY_RUN="1", **more)
    prepare, distil, convert = shown.stdout.splitlines()
    assert prepare.startswith("ONLY=sample\\ bridge\\ data sbatch --parsable ")
    assert "--partition=cpu slurm/distill_16b_to_0.6b.sh --lr 1e-4" in prepare
    assert "--dependency" not in prepare
    assert distil.startswith("ONLY=train sbatch --parsable --dependency=afterok:ID1 --kill-on-invalid-dep=yes ")
    assert "--nodes=4 slurm/distill_16b_to_0.6b.sh" in distil
    assert convert.startswith("ONLY=convert\\ evaluate\\ report sbatch --parsable --dependency=afterok:ID2 ")


def test_chain_lets_the_teacher_answer_on_nodes_of_its_own():
    more = {"CACHE": "1", "CACHE_SBATCH": "--nodes=2", "DRY_RUN": "1"}
    shown = run("bash", "slurm/chain.sh", "distill_16b_to_0.6b", **more).stdout.splitlines()
    assert [line.partition(" sbatch ")[0] for line in shown] == [
        "ONLY=sample\\ bridge\\ data",
        "ONLY=cache",
        "ONLY=train",
        "ONLY=convert\\ report",
    ]
    assert "--dependency=afterok:ID1 " in shown[1]
    assert "--nodes=2" in shown[1]
    assert "--dependency=afterok:ID2 " in shown[2]


def test_chain_prepares_with_the_stages_of_its_recipe():
    shown = run("bash", "slurm/chain.sh", "adapt_ar_to_bd3lm", DRY_RUN="1").stdout.splitlines()
    assert [line.partition(" sbatch ")[0] for line in shown] == [
        r"ONLY=student\ data", "ONLY=train", r"ONLY=convert\ report"
    ]  # fmt: skip


def test_chain_refuses_what_it_does_not_know(tmp_path):
    for arguments, environment, said in (
        (["nothing"], {}, "error: 'nothing': no such recipe in both recipes/ and slurm/; "),
        (["distill_16b_to_0.6b"], {"EVAL_DATA": str(tmp_path / "none")}, f"error: EVAL_DATA={tmp_path}/none: no such"),
        (["distill_16b_to_0.6b"], {"ONLY": "train"}, 'error: ONLY="train": this script sets ONLY itself; '),
    ):
        refused = run("bash", "slurm/chain.sh", *arguments, DRY_RUN="1", **environment)
        assert refused.returncode == 2
        assert refused.stderr.startswith(said)
        assert len(refused.stderr.splitlines()) == 1


FILLER = "step 1/9  loss 7.9612\n" * 20_000  # more than a pipe holds
ATTEMPT = "== attempt {} of 20: job 7 on a\n"
SAID = "step 3/9: stopped on request, checkpoint saved; run the same command again to continue\n"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (ATTEMPT.format(1) + FILLER + SAID, "saved"),
        (ATTEMPT.format(1) + SAID + FILLER, "saved"),
        (ATTEMPT.format(1) + FILLER + SAID + ATTEMPT.format(2) + FILLER, "nothing new to save"),
        (ATTEMPT.format(1) + FILLER + ATTEMPT.format(2) + SAID + FILLER, "saved"),
    ],
)
def test_whether_this_attempt_saved_is_read_from_a_log_of_any_length(tmp_path, log, expected):
    (tmp_path / "7.log").write_text(log)
    told = run("bash", "-c", f"source slurm/job.sh; LOG={tmp_path}/7.log; saved")
    assert (told.returncode, told.stdout) == (0, expected)


@pytest.mark.parametrize(
    ("log", "ranks", "expected"),
    [
        ("error: no bridge\nerror: stage data stopped with status 2; run it again\n", {}, "no bridge"),
        ("nothing\n", {}, "the recipe ended with status 9"),
        (
            "srun: error: n2: task 3: Out Of Memory\nerror: gone\nsrun: error: n1: task 0: Exited with exit code 1\n",
            {0: "error: rank 3 has died\n"},
            "rank 3 was killed (n2: task 3: Out Of Memory): by hand, or out of memory",
        ),
        (
            "srun: error: n2: tasks 2-3: Exited with exit code 1\nsrun: error: n1: task 0: Killed\n",
            {2: "Traceback\nValueError: old\n== attempt 2: rank 2\nTraceback\nRuntimeError: NCCL\n", 0: "error: no\n"},
            "RuntimeError: NCCL (rank 2)",
        ),
        (
            "srun: error: n2: task 2: Exited with exit code 1\n",
            {2: "silent\n"},
            "the recipe ended with status 9 (n2: task 2: Exited with exit code 1)",
        ),
    ],
)
def test_the_reason_is_that_of_the_rank_that_left_first(tmp_path, log, ranks, expected):
    (tmp_path / "7.log").write_text(ATTEMPT.format(1) + "error: of old\n" + ATTEMPT.format(2) + log + FILLER)
    for rank, text in ranks.items():
        (tmp_path / f"7.rank{rank}.log").write_text(text)
    lines = f"source slurm/job.sh; SLURM_JOB_ID=7 LOGS={tmp_path} LOG={tmp_path}/7.log; reason 9"
    told = run("bash", "-c", lines)
    assert (told.returncode, told.stdout) == (0, expected), told.stderr
