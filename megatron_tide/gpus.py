"""The GPUs of this machine that a run may use: how many, how many ranks they get, and why torch may see none.

Counting imports no torch, which takes seconds.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

DEVICES = Path("/dev")
VISIBLE = "CUDA_VISIBLE_DEVICES"
MANY = 1024  # more GPUs than a machine has


def count_gpus() -> int:
    """Number of GPUs that a process sees here; 0 without a driver."""
    try:
        command = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return seen_of(listed.splitlines(), os.environ.get(VISIBLE))


def seen_of(listed: Sequence[str], chosen: str | None) -> int:
    """How many of the GPUs that nvidia-smi has ``listed`` a process sees with ``chosen`` as CUDA_VISIBLE_DEVICES.

    CUDA shows a process one instance of a divided GPU (MIG) and no other GPU beside it.
    """
    whole = sum(line.startswith("GPU ") for line in listed)
    found = whole if chosen is None else min(whole, len(_names(chosen, whole)))
    return min(found, 1) if any(line.lstrip().startswith("MIG ") for line in listed) else found


def _names(chosen: str, whole: int) -> list[str]:
    """The devices that CUDA_VISIBLE_DEVICES names, up to the first one that does not exist, as CUDA reads it."""

    def exists(name: str) -> bool:
        return int(name) < whole if name.isdecimal() else name.startswith(("GPU-", "MIG-"))

    return list(takewhile(exists, (name.strip() for name in chosen.split(","))))


def fitting_ranks(gpus: int, batch: int, micro_batch: int, nodes: int = 1) -> int:
    """The most ranks per node, one per GPU at most, among which a global batch can be divided; 1 for none."""
    return next((n for n in range(gpus, 1, -1) if batch % (micro_batch * n * nodes) == 0), 1)


def refuse_idle_gpu() -> None:
    """Refuse to compute on the CPU of a machine whose GPU torch cannot use, unless the CPU was asked for.

    Raises:
        ValueError: why torch cannot use it, and how to ask for the CPU.
    """
    import torch

    chosen = os.environ.get(VISIBLE)
    if torch.cuda.is_available() or (chosen is not None and not _names(chosen, MANY)):
        return
    found = next((path for path in sorted(DEVICES.glob("nvidia[0-9]*")) if _opens(path)), None)
    if found is None:
        return
    try:
        torch.cuda.init()
        why = "it finds none"
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition(". ")[0]
    raise ValueError(
        f"{found} is a GPU, but torch {torch.__version__} cannot use it ({why}): update its driver, or install the "
        f"build of torch for that driver; to compute on the CPU, set {VISIBLE}= (empty)"
    )


def _opens(device: Path) -> bool:
    """Whether this process may use a device: a job without GPUs sees those of its node, but cannot open them."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
