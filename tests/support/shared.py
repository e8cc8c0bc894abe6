"""What several test files need is made once a session, also where files run in two processes at a time."""

from __future__ import annotations

import fcntl
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What ``make(folder)`` gives, of the process that asks first; it must pickle, and the folder is for reading."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # the folder that all processes have
    result = root / f"{name}.pickle"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            made = make(root / name)
            result.write_bytes(pickle.dumps(made))
    return pickle.loads(result.read_bytes())
