"""A run's own folder on the disk that hosts its teacher."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from megatron_tide.hosting.place import own_folder

USE = """
import sys, time
from pathlib import Path
from megatron_tide.hosting.place import own_folder
own = own_folder(Path(sys.argv[1]), "live")
(own / "share").write_bytes(b"weights")
print("ready", flush=True)
time.sleep(float(sys.argv[2]))
"""


def start(disk, seconds):
    """A process that has the folder ``live`` and lives for some time from then on."""
    process = subprocess.Popen([sys.executable, "-c", USE, str(disk), str(seconds)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


def age(folder):
    """An hour old."""
    os.utime(folder, (time.time() - 3600,) * 2)


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path):
    process = start(tmp_path, 60)
    live = tmp_path / "megatron_tide-live"
    young = tmp_path / "megatron_tide-young"
    (young / ".lock").parent.mkdir()
    (young / ".lock").touch()
    (tmp_path / "mine").mkdir()
    for folder in (live, tmp_path / "mine"):
        age(folder)
    own_folder(tmp_path, "second")
    assert (live / "share").exists(), "its run goes on"
    process.kill()
    process.wait()
    age(live)
    own = own_folder(tmp_path, "third")
    assert not live.exists()
    assert young.exists(), "its run may be about to take its lock"
    assert (tmp_path / "mine").exists()
    assert own.is_dir()


def test_a_run_leaves_nothing(tmp_path):
    process = start(tmp_path, 0)
    assert process.wait(timeout=60) == 0
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_run_share_its_folder(tmp_path):
    first = own_folder(tmp_path, "same")
    (first / "share").touch()
    age(first)
    assert own_folder(tmp_path, "same") == first
    assert (first / "share").exists()
