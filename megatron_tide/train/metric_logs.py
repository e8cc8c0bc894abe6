"""Where metrics go beside ``metrics.jsonl``: the classes of ``choices.METRIC_LOGS``, opened by rank 0 alone."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tide.files import atomic_write, read_regular
from megatron_tide.hub import one_line, public_name, published

PROJECT, RUN_ID = "megatron_tide", "wandb_id"


class TensorBoard:
    """Event files in ``folder/tensorboard``; a resumed run replaces the steps after ``first_step``."""

    def __init__(self, folder: Path, first_step: int, about: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    @classmethod
    def check(cls) -> None:
        """ValueError, one line, where what it needs is missing: for dry runs."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases(TensorBoard):
    """The same in TensorBoard, and a run of Weights & Biases with the flags ``about``, without local paths, and with
    its metrics of the system, without its description of the machine and the command line.

    Its environment variables hold (WANDB_PROJECT, WANDB_NAME, WANDB_MODE=offline, ...). A resumed training goes on with
    the run whose id is in ``folder``; Weights & Biases keeps the first value of a step that is repeated.

    Raises:
        ValueError: the package is missing, or cannot log in.
    """

    def __init__(self, folder: Path, first_step: int, about: Mapping[str, Any]) -> None:
        super().__init__(folder, first_step, about)
        wandb = _installed()
        identity = folder / RUN_ID
        if not identity.exists():
            atomic_write(identity, secrets.token_hex(8).encode())
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
        place = folder.resolve()
        os.environ.setdefault("WANDB_NAME", f"{public_name(str(place.parent))}/{place.name}")
        run_id = read_regular(identity, 64).decode("ascii", "replace")
        try:
            self._run = wandb.init(
                dir=str(folder),
                id=run_id,
                resume="allow",
                config=published(about),
                job_type="distill",
                settings={"x_disable_meta": True},  # this machine, and the command line with its local paths
            )
        except Exception as error:  # of many kinds: no key, no network, a broken service process
            why = one_line(str(error))
            raise ValueError(
                f"--log-to wandb: {why}; log in (wandb login), or set WANDB_MODE=offline and upload it later"
            ) from None

    @classmethod
    def check(cls) -> None:
        _installed()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        super().write(step, values)
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        super().close()
        self._run.finish()


def _installed() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError("--log-to wandb: not installed; pip install -r requirements-wandb.txt") from None
