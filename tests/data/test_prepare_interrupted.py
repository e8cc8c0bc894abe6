"""Preparing that is killed, meets a full disk or corrupt shards: what is finished stays, and the end is the same."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tide.data import prepare
from megatron_tide.data.build import PrepareJob, build_shard
from megatron_tide.data.shard import shard_name
from megatron_tide.lock import RunLock
from tests.data.conftest import Pair
from tests.data.preparing import RUN, Chats, content_of, flags_of, main, prepared, shards
from tests.support.disk import small_disk


def _forked(arguments: list[str]) -> int:
    """Start ``main`` in a process of its own that need not import anything again; its process id."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    try:
        os._exit(main(arguments))
    finally:
        os._exit(1)


def test_killed_at_20_random_moments_it_ends_with_the_same_bytes(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    path, out, moments = chats(1200), tmp_path / "killed", random.Random(20260101)
    prepared(pair, path, tmp_path / "untouched")
    progress = []
    for _ in range(20):
        child = _forked(flags_of(pair, path, out))
        goal = shards(out) + moments.randint(0, 4)
        while shards(out) < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(moments.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        progress.append(shards(out))
    assert progress == sorted(progress)
    assert 0 < progress[-1] < 75
    assert not (out / "manifest.json").exists()
    prepared(pair, path, out)
    assert content_of(out) == content_of(tmp_path / "untouched")


@pytest.mark.slow
def test_a_killed_command_with_workers_ends_with_the_same_bytes(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    path, out = chats(600), tmp_path / "killed"
    prepared(pair, path, tmp_path / "untouched")
    command = [*RUN, *flags_of(pair, path, out, "--workers", "2")]
    for goal in (3, 20):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        while shards(out) < goal:
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert shards(out) < 38
    assert subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    assert content_of(out) == content_of(tmp_path / "untouched")


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [*RUN, *flags_of(pair, chats(3000), out, "--workers", "2", "--shard-rows", "4")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while not shards(out):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers outlived their parent")


def test_finished_shards_are_kept_and_corrupt_ones_built_again(
    pair: Pair, chats: Chats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = chats(64), tmp_path / "out"
    prepared(pair, path, out)
    before = content_of(out)
    built: list[int] = []

    def counting(job: PrepareJob, number: int) -> None:
        built.append(number)
        build_shard(job, number)

    monkeypatch.setattr("megatron_tide.data.build.build_shard", counting)
    prepared(pair, path, out)
    assert built == []
    corrupt = bytearray(before[shard_name(1)])
    corrupt[-1] ^= 1
    (out / shard_name(1)).write_bytes(corrupt)
    (out / shard_name(2)).write_bytes(before[shard_name(2)][:100])
    (out / shard_name(3)).unlink()
    prepared(pair, path, out)
    assert built == [1, 2, 3]
    assert content_of(out) == before


def test_a_full_disk_leaves_what_is_finished(
    pair: Pair, chats: Chats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = chats(64), tmp_path / "out"
    prepared(pair, path, tmp_path / "untouched")
    write = os.fsync
    writes: list[int] = []

    def full(descriptor: int) -> None:
        writes.append(descriptor)
        if len(writes) == 7:  # each file counts twice, itself and its folder: settings, two shards, then a third
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*shard-00002.*; 2 of 4 shards are finished"):
        main(flags_of(pair, path, out))
    monkeypatch.undo()
    assert not list(out.glob(".tide-tmp*"))
    assert shards(out) == 2
    assert not (out / "manifest.json").exists()
    prepared(pair, path, out)
    assert content_of(out) == content_of(tmp_path / "untouched")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "64k") as disk:
        yield disk


@pytest.mark.slow
def test_a_small_disk_ends_a_run_with_one_line(pair: Pair, chats: Chats, tiny_disk: Path) -> None:
    command = [*RUN, *flags_of(pair, chats(600), tiny_disk / "out", "--workers", "2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr
    finished = shards(tiny_disk / "out")
    assert finished > 0
    assert f"{finished} of 38 shards are finished" in done.stderr


def test_two_at_once_on_one_folder(pair: Pair, chats: Chats, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with RunLock(out, prepare._LOCK), pytest.raises(ValueError, match="in use by"):
        main(flags_of(pair, chats(5), out))
    prepared(pair, chats(5), out)
