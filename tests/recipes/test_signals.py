"""Ctrl-C, TERM and USR1 outside Slurm: sent to the recipe, they save one checkpoint and end it with 130."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
STAGE = REPOSITORY / "recipes" / "stage.py"
FLAGS = ["--precision", "fp32", "--teacher-dtype", "fp32", "--global-batch-size", "4", "--micro-batch-size", "1"]
FLAGS += ["--log-every", "1", "--save-every", "100000", "--max-steps", "4000", "--skip-teacher-probe"]


def processes_of(run):
    """Processes of this machine that name the run's folder in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if str(run).encode() in words and int(path.parent.name) != os.getpid():
            found.append(words)
    return found


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("ranks", "number", "to_all"),
    [
        (1, signal.SIGTERM, False),
        (2, signal.SIGTERM, False),
        (2, signal.SIGUSR1, False),
        (1, signal.SIGINT, True),  # a terminal sends Ctrl-C to all that runs in it
        (2, signal.SIGINT, True),
    ],
    ids=["term-1", "term-2", "usr1-2", "ctrl-c-1", "ctrl-c-2"],
)
def test_recipe_saves_and_stops(chain, tmp_path, ranks, number, to_all):
    run = tmp_path / "run"
    run.mkdir()
    for part in ("bridge", "data"):
        (run / part).symlink_to(chain.root / part)
    options = {
        "TEACHER": chain.root / "teacher",
        "STUDENT": chain.root / "student",
        "DATA": chain.root / "corpus.jsonl",
    }
    options |= {"PYTHON": sys.executable, "RUNS": tmp_path, "NAME": "run", "ONLY": "train convert", "NPROC": ranks}
    environment = {**os.environ, **{name: str(value) for name, value in options.items()}, "CUDA_VISIBLE_DEVICES": ""}
    recipe = subprocess.Popen(
        ["bash", str(REPOSITORY / "recipes" / "distill_16b_to_0.6b.sh"), *FLAGS],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # its own process group, as in a terminal
    )
    try:
        metrics = run / "tide-cross" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and metrics.read_text(), 120, "no step within two minutes")
        (os.killpg if to_all else os.kill)(recipe.pid, number)
        printed, _ = recipe.communicate(timeout=240)
    finally:
        recipe.kill()
    assert recipe.returncode == 130, printed[-3000:]
    assert printed.count("stopped on request, checkpoint saved") == 1
    said, _, again = printed.splitlines()[-1].partition("; to continue: ")
    assert said == "stage train-tide-cross: stopped on request"
    assert shlex.split(again) == [
        *(f"{name}={options[name]}" for name in ("DATA", "NAME", "NPROC", "PYTHON", "RUNS", "STUDENT", "TEACHER")),
        "CUDA_VISIBLE_DEVICES=",
        "ONLY=train convert",
        *("bash", "recipes/distill_16b_to_0.6b.sh", *FLAGS),
    ]
    (saved,) = (run / "tide-cross").glob("step-*")
    assert json.loads((saved / "trainer.json").read_text())["state"]["step"] >= 1
    assert "== convert" not in printed
    wait_for(lambda: not processes_of(run), 20, "a process is left")


def stage(tmp_path, *command):
    line = [sys.executable, str(STAGE), str(tmp_path / "one.json"), "--", *map(str, command)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def asked(tmp_path, number, shell, program="bash"):
    """Status and words of a stage whose command, shell lines that make a file "up", was sent a signal."""
    script = tmp_path / program
    script.write_text("#!/usr/bin/env bash\n" + shell.replace("UP", f"touch {tmp_path}/up"))
    script.chmod(0o755)
    process = stage(tmp_path, script)
    wait_for((tmp_path / "up").exists, 20, "the command did not start")
    process.send_signal(number)
    printed, _ = process.communicate(timeout=240)
    assert (tmp_path / "one.json").exists() == (process.returncode == 0)
    return process.returncode, printed


LOOP = "for ((i = 0; i < 200; i++)); do sleep 0.1; done\n"
STOPPED = "stage one: stopped on request; to continue: the recipe's command"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("shell", [f"UP\n{LOOP}", f"trap 'exit 130' TERM USR1\nUP\n{LOOP}"], ids=["killed", "saved"])
def test_a_stage_that_was_asked_ends_with_130(tmp_path, number, shell):
    status, printed = asked(tmp_path, number, shell)
    assert status == 130
    assert printed.splitlines()[-1] == STOPPED


def test_a_stage_that_fails_while_it_stops_keeps_its_status(tmp_path):
    status, printed = asked(tmp_path, signal.SIGTERM, f"trap 'exit 2' TERM\nUP\n{LOOP}")
    assert status == 2
    assert "error: stage one stopped with status 2" in printed


def test_a_stage_that_had_finished_counts(tmp_path):
    status, printed = asked(tmp_path, signal.SIGTERM, f"trap 'exit 0' TERM\nUP\n{LOOP}")
    assert status == 0
    assert STOPPED not in printed


def test_srun_is_asked_in_words_that_leave_time_to_save(tmp_path):
    shell = f"trap 'echo got USR1; exit 130' USR1\ntrap 'echo got TERM; exit 0' TERM\nUP\n{LOOP}"
    status, printed = asked(tmp_path, signal.SIGTERM, shell, program="srun")
    assert status == 130
    assert "got USR1" in printed
    assert "got TERM" not in printed


def test_srun_that_gave_its_ranks_up_has_not_finished(tmp_path):
    status, printed = asked(tmp_path, signal.SIGTERM, f"trap 'exit 0' USR1\nUP\n{LOOP}", program="srun")
    assert status == 130
    assert printed.splitlines()[-1] == STOPPED


def test_a_command_that_is_interrupted_ends_with_130():
    code = "import sys; from megatron_tide import cli\ndef main(argv): raise KeyboardInterrupt\ncli.run(main, [])"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
