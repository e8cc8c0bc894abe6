"""Python interface to the cluster's scheduler, Slurm; its scripts are in slurm/.

Another scheduler needs a file like this one, and a folder of scripts like slurm/.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Sequence
from pathlib import Path

STOP = signal.SIGUSR1  # srun forwards it to its tasks; on TERM it kills them, with no time to save


def job() -> tuple[str, str]:
    """Id and attempt number of the job of this process; ("", "0") outside of a job."""
    return os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "0")


def cluster() -> str:
    """The cluster of this process's job, whose ids are its own; "" outside of a job."""
    return os.environ.get("SLURM_CLUSTER_NAME", "")


def starts_ranks(command: Sequence[str]) -> bool:
    """Whether a command is the scheduler's launcher, which starts the ranks of a run on all nodes."""
    return Path(command[0]).name == "srun"


def stopped_by(signals: Collection[int], status: int) -> bool:
    """Whether the launcher ended with ``status`` because it received the stop signals ``signals``.

    When Slurm cancels a job, srun abandons its tasks and exits with 0.
    """
    return (signal.SIGTERM in signals and status == 0) or status == 128 + STOP
