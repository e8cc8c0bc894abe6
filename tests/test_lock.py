"""One run folder, one run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from megatron_tide.lock import STALE, RunLock

HOLD = "import sys, time\nfrom pathlib import Path\nfrom megatron_tide.lock import RunLock\n" + (
    "with RunLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
)


def holder(folder, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, env={**os.environ, **environment}
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_second_is_refused_and_the_first_goes_on(tmp_path):
    process = holder(tmp_path, SLURM_JOB_ID="4711")
    try:
        with pytest.raises(ValueError, match=rf"job 4711 \(process {process.pid} on .*\) works in it") as refused:
            RunLock(tmp_path).__enter__()
        assert "\n" not in str(refused.value)
        assert (tmp_path / ".lock").exists()
    finally:
        process.kill()
        process.wait()


def test_free_again_when_left(tmp_path):
    with RunLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_process_left_is_recognised_at_once(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def left_by(folder, **changes):
    """A lock as a process on another machine left it."""
    holder = {"host": "elsewhere", "pid": 1, "started": "5", "job": "7", "attempt": "0", **changes}
    (folder / ".lock").write_text(json.dumps(holder))


def test_another_machines_lock_is_stale_when_nobody_touches_it(tmp_path):
    left_by(tmp_path)
    with pytest.raises(ValueError, match=r"job 7 \(process 1 on elsewhere\)"):
        RunLock(tmp_path).__enter__()
    old = time.time() - STALE - 1
    os.utime(tmp_path / ".lock", (old, old))
    with RunLock(tmp_path):
        pass


def test_a_requeued_job_takes_its_own_lock(tmp_path, monkeypatch):
    left_by(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(ValueError, match="job 7"):
        RunLock(tmp_path).__enter__()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with RunLock(tmp_path):
        pass


def test_of_many_at_once_one_gets_it(tmp_path):
    left_by(tmp_path)
    old = time.time() - 2 * STALE
    os.utime(tmp_path / ".lock", (old, old))
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    try:
        deadline = time.monotonic() + 30
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (one,) = [process for process in processes if process.poll() is None]
        assert one.stdout.readline() == b"held\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.ranks
def test_a_second_training_run_is_refused(chain, tmp_path):
    from megatron_tide import cli

    process = holder(tmp_path / "run")
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "megatron_tide.distill", *chain.flags(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert finished.returncode == cli.EXIT_USER_ERROR
        assert "works in it; stop that run or wait for it" in finished.stderr.splitlines()[-1]
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        process.kill()
        process.wait()
