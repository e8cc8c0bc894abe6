"""One run folder, one run."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from megatron_tide import lock
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
        with pytest.raises(ValueError, match=rf"in use by job 4711 \(process {process.pid} on .*\)") as refused:
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


@pytest.mark.parametrize(
    "holder", [{"attempt": "2"}, {"cluster": "other", "attempt": "0"}, {"attempt": ["0"]}, {"attempt": "9" * 5_000}]
)
def test_a_later_attempt_and_another_clusters_job_keep_theirs(tmp_path, monkeypatch, holder):
    for name, value in (("JOB_ID", "7"), ("RESTART_COUNT", "1"), ("CLUSTER_NAME", "here")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    about = {"host": "a", "pid": 1, "job": "7", "cluster": "here", **holder}
    (tmp_path / ".lock").write_text(json.dumps(about))
    if holder["attempt"] in ("2", "0"):
        with pytest.raises(ValueError, match="in use by job 7"):
            RunLock(tmp_path).__enter__()
    else:  # no number: of an attempt before any
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


def test_a_lock_that_cannot_be_written_is_not_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (full, lambda *_: 1):  # the second: for one byte there was room
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(OSError, match=r"No space left on device: '.*\.lock'"):
            RunLock(tmp_path).__enter__()
        assert list(tmp_path.iterdir()) == []


class Ranks:
    """Two ranks, one after the other: rank 0's words for rank 1."""

    is_main = True
    said = None

    def broadcast_object(self, value):
        if self.is_main:
            self.said = value
        return self.said


def test_all_ranks_are_refused_alike_where_rank_0_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    ranks = Ranks()
    for ranks.is_main in (True, False):
        with pytest.raises(ValueError, match="file"), lock.locked(tmp_path / "file", ranks):
            pass


@pytest.mark.ranks
def test_a_second_training_run_is_refused(chain, tmp_path):
    from megatron_tide import errors

    process = holder(tmp_path / "run")
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "megatron_tide.distill", *chain.flags(tmp_path / "run")],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert finished.returncode == errors.EXIT_USER_ERROR
        assert "in use by another run" in finished.stderr.splitlines()[-1]
        assert "; stop that run or wait for it" in finished.stderr.splitlines()[-1]
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    finally:
        process.kill()
        process.wait()


def here(**changes):
    """A lock as a process of this machine left it that has ended, changed."""
    mine = lock._myself()
    return {**mine, "pid": mine["pid"], "started": "1", **changes}


@pytest.mark.parametrize("changes", [{"processes": 1}, {"boot": "another boot"}], ids=str)
def test_between_containers_of_one_host_name_only_the_touches_count(tmp_path, changes):
    (tmp_path / ".lock").write_text(json.dumps(here(**changes)))
    with pytest.raises(ValueError, match="in use by"):
        RunLock(tmp_path).__enter__()
    (tmp_path / ".lock").write_text(json.dumps(here()))
    with RunLock(tmp_path):
        pass


UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork")


def test_a_container_does_not_take_the_live_folder_of_another(tmp_path):
    if subprocess.run([*UNSHARE, "true"]).returncode:
        pytest.skip("NOT TESTED: no process namespaces here")
    process = subprocess.Popen(
        [*UNSHARE, "--mount-proc", "--kill-child", sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use by"):
            RunLock(tmp_path).__enter__()
    finally:
        process.kill()
        process.wait()


def test_a_lock_dated_in_the_future_ends(tmp_path):
    left_by(tmp_path)
    future = time.time() + 3600
    os.utime(tmp_path / ".lock", (future, future))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["[" * 9_999, "1" * 9_999, "null", '{"pid": ' + "9" * 5_000 + "}", "\x00\x1b"])
def test_a_lock_that_is_not_ours_expires_like_any_other(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(ValueError, match="in use by another run"):
        RunLock(tmp_path).__enter__()
    os.utime(tmp_path / ".lock", (1, 1))
    with RunLock(tmp_path):
        pass


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/etc/hostname")])
def test_what_is_no_lock_is_one_line_and_hangs_nothing(tmp_path, make):
    make(tmp_path / ".lock")
    with pytest.raises(ValueError, match=r"\.lock: not a regular file, but a lock file is expected here; remove it"):
        RunLock(tmp_path).__enter__()


def test_one_that_waits_gets_it_when_the_holder_has_left(tmp_path):
    process = holder(tmp_path)
    threading.Timer(0.5, process.kill).start()
    started = time.monotonic()
    with RunLock(tmp_path, wait=True):
        assert time.monotonic() - started > 0.4
    process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_process_keeps_its_lock(tmp_path):
    with RunLock(tmp_path):
        os.utime(tmp_path / ".lock", (1, 1))  # as long after Ctrl-Z
        assert lock.is_held(tmp_path / ".lock")
        with pytest.raises(ValueError, match="in use by"):
            RunLock(tmp_path).__enter__()


def test_held_or_not(tmp_path):
    assert not lock.is_held(tmp_path / ".lock")
    with RunLock(tmp_path):
        assert lock.is_held(tmp_path / ".lock")
    (tmp_path / ".lock").write_text(json.dumps(here()))
    assert not lock.is_held(tmp_path / ".lock")


def test_a_lock_that_may_not_be_read_is_said_to_be(tmp_path, monkeypatch):
    left_by(tmp_path)

    def refused(path, most):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(lock, "read_regular", refused)  # root may read anything
    with pytest.raises(ValueError, match=r"\.lock: the lock of another user's run, which you may not read"):
        RunLock(tmp_path).__enter__()


def test_a_run_whose_host_is_renamed_leaves_no_lock(tmp_path, monkeypatch):
    with RunLock(tmp_path):
        monkeypatch.setattr("socket.gethostname", lambda: "renamed")
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_in_a_lock_s_place_is_no_error_at_the_end(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".lock").unlink()
        os.mkfifo(tmp_path / ".lock")
    assert (tmp_path / ".lock").is_fifo()
