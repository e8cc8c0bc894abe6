"""A checkpoint of the trainer, opened for reading: verified, described, its tensors one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_tide.models.load import resolve_folder
from megatron_tide.train.checkpoint import CHECKSUMS, PREFIX, STATE, WEIGHTS, read_description, verify

JOURNAL = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What training left: ``folder`` (of the step), ``start`` (the hub-format folder it began from), and its records.

    ``run`` is the recorded run (config, strategy, fingerprints, data manifest), ``state`` the trainer's counters, and
    ``metrics`` the last values logged up to this step.
    """

    folder: Path
    start: Path
    run: dict[str, Any]
    state: dict[str, Any]
    metrics: dict[str, float]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def names(self) -> set[str]:
        """Names of the trained parameters."""
        with self._weights() as file:
            return set(file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """One fp32 master weight."""
        with self._weights() as file:
            return file.get_tensor(name)

    def _weights(self) -> Any:
        try:
            return safe_open(self.folder / WEIGHTS, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / WEIGHTS}: cannot be read ({error})") from None


def open_trained(path: str | Path, start: str | None = None) -> Trained:
    """Open a step folder, or a run folder's newest step, after checking every file's checksum.

    ``start`` names the folder the run began from, where it has moved since.

    Raises:
        ValueError: no checkpoint there, a damaged file (named), or a starting folder that is gone.
    """
    folder = _step_folder(Path(path))
    verify(folder)
    try:
        described = read_description(folder)
        run, state = described["run"], described["state"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / STATE}: not a description of a checkpoint ({error!r})") from None
    origin = start or run["model_folder"]
    try:
        begun = resolve_folder(origin)
    except ValueError as error:
        raise ValueError(f"{folder}: the model it began from cannot be found ({error}); name it with --start") from None
    metrics = _last_metrics(folder.parent / JOURNAL, int(state["step"]))
    return Trained(folder=folder, start=begun, run=run, state=state, metrics=metrics)


def is_checkpoint(path: str | Path) -> bool:
    """Whether ``path`` is a step folder or a run folder of the trainer (and not, say, a model in hub format)."""
    path = Path(path)
    return (path / CHECKSUMS).is_file() or any(path.glob(f"{PREFIX}*/{CHECKSUMS}"))


def _step_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a run folder or one of its {PREFIX}* folders")
    if (path / WEIGHTS).is_file() and (path / STATE).is_file():
        return path
    steps = sorted(folder for folder in path.glob(f"{PREFIX}*") if (folder / CHECKSUMS).is_file())
    if not steps:
        raise ValueError(f"{path}: holds no whole checkpoint ({PREFIX}*/{CHECKSUMS}); has the run saved one yet?")
    return steps[-1]


def _last_metrics(journal: Path, step: int) -> dict[str, float]:
    """The newest value of each metric logged at or before ``step``; nothing where there is no journal."""
    values: dict[str, float] = {}
    if journal.is_file():
        for line in journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # a line that a killed run left half written
            if isinstance(entry, dict) and entry.get("step", step + 1) <= step:
                values |= {name: value for name, value in entry.items() if name != "step"}
    return values
