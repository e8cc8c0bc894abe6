"""Disks of tests: whether a teacher can be hosted on one (libaio is there to compile against), and very small ones."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HAS_DISK_IO = Path("/usr/include/libaio.h").exists()
needs_disk_io = pytest.mark.skipif(not HAS_DISK_IO, reason="libaio-dev is not installed")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of ``size`` (as mount takes it) at ``folder``; the test is skipped where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
