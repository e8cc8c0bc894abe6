"""A lock of DeepSpeed's op builder goes when nobody holds it, and never before."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from megatron_tide.ds_ops import YOUNG_SECONDS, clear


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "op" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def age(lock: Path) -> None:
    long_ago = time.time() - 10 * YOUNG_SECONDS
    os.utime(lock, (long_ago, long_ago))


def test_one_that_a_killed_build_left_goes_at_once(lock: Path) -> None:
    age(lock)
    clear(lock)
    assert not lock.exists()


def test_a_young_one_is_left_to_its_holder(lock: Path) -> None:
    held = []

    def load() -> None:
        time.sleep(0.5)
        held.append(lock.exists())
        lock.unlink()

    holder = threading.Thread(target=load)
    holder.start()
    clear(lock)
    holder.join()
    assert held == [True]


def test_one_of_a_build_under_way_is_waited_for(lock: Path) -> None:
    age(lock)
    with subprocess.Popen(["sleep", "1"], cwd=lock.parent) as build:
        clear(lock)
        assert build.poll() is not None
    assert not lock.exists()
