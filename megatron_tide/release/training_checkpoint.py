"""A checkpoint of the trainer, opened for reading: verified, described, its tensors one at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_tide.models import load_model
from megatron_tide.models.load import resolve_folder
from megatron_tide.train.checkpoint import CHECKSUMS, PREFIX, STATE, WEIGHTS, read_description, verify

JOURNAL = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainingCheckpoint:
    """A checkpoint of the trainer: ``folder`` (of the step), ``base_model`` (the folder training began from), records.

    ``run`` is the recorded run (config, strategy, fingerprints, data manifest), ``state`` the trainer's counters, and
    ``metrics`` the last values logged up to this step.
    """

    folder: Path
    base_model: Path
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

    def model(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
        """The training module with these weights cast to ``dtype``, in eval mode; memory for one copy.

        Raises:
            ValueError: when the starting folder describes other parameters.
        """
        model = load_model(self.base_model, dtype, device=device, as_student=True)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in sorted(self.names()):
                weight = self.tensor(name)
                if name not in parameters or parameters[name].shape != weight.shape:
                    raise ValueError(
                        f"{self.folder}: {name} is not what {self.base_model}/config.json describes; "
                        "name the right --base-model"
                    )
                parameters[name].copy_(weight)
        return model

    def _weights(self) -> Any:
        try:
            return safe_open(self.folder / WEIGHTS, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / WEIGHTS}: cannot be read ({error})") from None


def open_checkpoint(path: str | Path, base_model: str | None = None) -> TrainingCheckpoint:
    """Open a step folder, or a run folder's newest step, after checking every file's checksum.

    ``base_model`` names the folder the run began from, where it has moved since.

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
    origin = base_model or run["model_folder"]
    try:
        begun = resolve_folder(origin)
    except ValueError as error:
        raise ValueError(
            f"{folder}: the model it began from cannot be found ({error}); name it with --base-model"
        ) from None
    metrics = _last_metrics(folder.parent / JOURNAL, int(state["step"]))
    return TrainingCheckpoint(folder=folder, base_model=begun, run=run, state=state, metrics=metrics)


@dataclass(frozen=True)
class Opened:
    """A model ready to run, and the folder its tokenizer and config are in."""

    model: Any
    folder: Path


def open_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Opened:
    """A model in hub format (folder or hub name), or a checkpoint of the trainer (a run folder: its newest step).

    Raises:
        ValueError: neither, or damaged.
    """
    folder = Path(path)
    if (folder / CHECKSUMS).is_file() or any(folder.glob(f"{PREFIX}*/{CHECKSUMS}")):
        trained = open_checkpoint(folder)
        return Opened(trained.model(dtype, device), trained.base_model)
    found = resolve_folder(path)
    return Opened(load_model(found, dtype, device=device), found)


def _step_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; give a run folder or one of its {PREFIX}* folders")
    if any((path / name).is_file() for name in (STATE, CHECKSUMS)):
        return path
    steps = sorted(folder for folder in path.glob(f"{PREFIX}*") if (folder / CHECKSUMS).is_file())
    if not steps:
        raise ValueError(f"{path}: holds no complete checkpoint ({PREFIX}*/{CHECKSUMS}); has the run saved one yet?")
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
