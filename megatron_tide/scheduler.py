"""The cluster's scheduler, Slurm, as Python code meets it; its scripts are in slurm/.

Another scheduler is another file like this one, and a folder of scripts like slurm/.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Sequence
from pathlib import Path

STOP = signal.SIGUSR1  # srun hands it to its tasks; TERM has it kill them, with no time to save


def job() -> tuple[str, str]:
    """The job that this process belongs to and which of its attempts this is; ("", "0") outside of one."""
    return os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")


def starts_ranks(command: Sequence[str]) -> bool:
    """Whether a command is the scheduler's own, which starts the ranks of a run on all nodes."""
    return Path(command[0]).name == "srun"


def gave_up(asked: Collection[int], status: int) -> bool:
    """Whether that command ended because it was asked to stop with the signals ``asked``.

    When Slurm cancels a job, srun gives its tasks up, and leaves with 0.
    """
    return (signal.SIGTERM in asked and status == 0) or status == 128 + STOP
