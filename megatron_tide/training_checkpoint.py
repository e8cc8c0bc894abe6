"""Checkpoints of the trainer, for reading: verified, described, with tensors read one at a time.

    runs/NAME/run.json                  what the run is (config, strategy, fingerprints)
    runs/NAME/metrics.jsonl             what it logged
    runs/NAME/step-00000020/
        model.safetensors               fp32 master weights, complete tensors by parameter name
        exp_avg.safetensors exp_avg_sq.safetensors
        trainer.json                    TrainState, and run.json again: a checkpoint describes itself
        checksums.json                  sha256 of every file above; its presence makes the checkpoint complete

``megatron_tide.train.checkpoint`` writes them. Nothing is unpickled.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_tide import models
from megatron_tide.choices import STRATEGIES
from megatron_tide.data.prepared import SIDE, TEACHER_SIDE
from megatron_tide.files import check_form, read_json, sha256_files
from megatron_tide.tables import read_rows

WEIGHTS, STATE, CHECKSUMS = "model.safetensors", "trainer.json", "checksums.json"
PREFIX = "step-"
_STEP_FOLDER = re.compile(rf"{PREFIX}[0-9]{{8}}")
METRICS = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run needs to resume, in addition to its tensors; data order and noise are pure functions of ``step``."""

    step: int  # optimizer steps taken
    total_steps: int
    samples_seen: int = 0

    def after_step(self, samples: int) -> TrainState:
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples)


_STATE = [field.name for field in fields(TrainState)]
_FORM = {"state": dict.fromkeys(_STATE, range(1 << 53)), "run": dict}
_RUN = {  # what a model is made of; resuming compares what is there
    "run": {
        "config": {"paths": {"student": str, "teacher?": (None, str)}, "strategy": {"strategy": str}, str: dict},
        "strategy": {"chunk_objective": str, "distribution_objective": str},
        "phases?": [{"strategy": str, "end": range(1 << 53)}],
        "bridge_fingerprint": (None, str),
        "data_fingerprint": str,
        "fingerprint": str,
        "model_folder": str,
        "data": {"student": SIDE, "teacher": (None, TEACHER_SIDE), "sources?": [{"path?": str}]},
    },
}


def read_description(folder: Path) -> dict[str, Any]:
    """``{"state": ..., "run": ...}`` of a checkpoint.

    Raises:
        ValueError: when the file is not a checkpoint description.
    """
    found = read_json(folder / STATE, "take another checkpoint")
    _check(folder, found, _FORM)
    return found


def _check(folder: Path, described: dict[str, Any], form: dict[str, Any]) -> None:
    where = f"{folder / STATE}: not a checkpoint description of this version"
    check_form(described, form, where, "; use another checkpoint")


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its checksum.

    Raises:
        ValueError: names the first file that is missing or corrupt.
    """
    try:
        checksums = read_json(folder / CHECKSUMS, form={WEIGHTS: str, STATE: str})
    except ValueError as error:
        raise ValueError(f"{folder}: no readable {CHECKSUMS} ({error}), so the checkpoint is incomplete") from None
    if unlisted := [path for path in folder.glob("*.safetensors") if path.name not in checksums]:
        raise ValueError(f"{unlisted[0]}: not in {CHECKSUMS}; remove it, or use another checkpoint")
    for name in checksums:
        if Path(name).name != name or "\0" in name:
            raise ValueError(f"{folder / CHECKSUMS}: names {name!r}, which is not a file in the same folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing from the checkpoint")
    tensors = [name for name in checksums if name.endswith(".safetensors")]
    for name in tensors:  # headers tell of a truncated file at once, where reading 50 GB takes minutes
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name}: corrupt ({error})") from None
    for names in ([name for name in checksums if name not in tensors], tensors):
        for name, found in zip(names, sha256_files(folder / name for name in names)):
            if found != checksums[name]:
                raise ValueError(f"{folder / name}: corrupt (its checksum differs)")


def step_folders(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: real folders with a step's name. Links (``step-best``) do not count."""
    found = run_folder.glob(f"{PREFIX}*")
    return sorted(f for f in found if _STEP_FOLDER.fullmatch(f.name) and f.is_dir() and not f.is_symlink())


def newest_complete(run_folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose checksums match; a corrupt one is passed to ``report`` and skipped."""
    for folder in reversed(step_folders(run_folder)):
        try:
            verify(folder)
        except ValueError as error:
            report(f"warning: {error}; using the previous checkpoint")
            continue
        return folder
    return None


@dataclass(frozen=True, kw_only=True)
class GenerationIds:
    """The token ids that generating needs, and the block size that the model was trained with."""

    block_size: int
    mask_token_id: int
    eos_token_id: int
    pad_token_id: int


@dataclass(frozen=True, kw_only=True)
class TrainingCheckpoint:
    """One step of a run: its ``folder``, ``base_model`` (the hub-format folder that training began from), its records.

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

    def generation_ids(self, tokenizer_fingerprint: str, template_fingerprint: str | None) -> GenerationIds:
        """Those of the training data, which the trainer recorded.

        Raises:
            ValueError: when tokenizer or chat template are not those that the run used.
        """
        student = self.run["data"]["student"]
        if student["fingerprint"] != tokenizer_fingerprint:
            raise ValueError(
                f"{self.base_model}: its tokenizer is not that of {self.folder}; set the right --base-model"
            )
        if student.get("template_fingerprint") != template_fingerprint:
            raise ValueError(
                f"{self.base_model}: its chat template is not the one that {self.folder} was trained with; restore it, "
                "or set the right --base-model"
            )
        return GenerationIds(
            block_size=student["block"],
            mask_token_id=student["mask_id"],
            eos_token_id=student["eos_id"],
            pad_token_id=student["pad_id"],
        )

    def names(self) -> set[str]:
        """Names of the trained parameters."""
        with self._weights() as file:
            return set(file.keys())

    def tensor(self, name: str) -> torch.Tensor:
        """One fp32 master weight."""
        with self._weights() as file:
            return file.get_tensor(name)

    def model(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Any:
        """The student with these weights cast to ``dtype``, in eval mode; memory for one copy.

        Raises:
            ValueError: when the base model describes other parameters.
        """
        model = models.load_model(self.base_model, dtype, device=device, as_student=True)
        model.config.block_size = self.run["data"]["student"]["block"]
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in sorted(self.names()):
                weight = self.tensor(name)
                if name not in parameters or parameters[name].shape != weight.shape:
                    raise ValueError(
                        f"{self.folder}: {name} does not match {self.base_model}/config.json; "
                        "set the right --base-model"
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

    ``base_model`` names the folder the run began from, if it has moved since.

    Raises:
        ValueError: no checkpoint there, a corrupt file (named), a missing base model, or an autoregressive model.
    """
    folder = step_folder(Path(path))
    verify(folder)
    described = read_description(folder)
    _check(folder, described, _RUN)
    origin, state = base_model or described["run"]["model_folder"], described["state"]
    _refuse_autoregressive(folder, described["run"].get("phases", []), state["step"])
    try:
        begun = models.resolve_folder(origin)
        if not (begun / "config.json").is_file():
            raise ValueError(f"{origin!r}: no config.json there")
    except ValueError as error:
        raise ValueError(
            f"{folder}: the model that training began from is not found ({error}); set --base-model"
        ) from None
    metrics = _last_metrics(folder.parent / METRICS, state["step"])
    return TrainingCheckpoint(folder=folder, base_model=begun, run=described["run"], state=state, metrics=metrics)


def _refuse_autoregressive(folder: Path, phases: list[dict[str, Any]], step: int) -> None:
    """ValueError for weights that were last trained without masks: read as a block diffusion model they are noise."""
    name = next((phase["strategy"] for phase in phases if step <= phase["end"]), "")
    if name in STRATEGIES and not STRATEGIES[name].denoise:
        raise ValueError(
            f"{folder}: step {step} was trained with {name}, so the model is autoregressive and cannot denoise; "
            f"train with --pretraining {name}:SHARE and another --strategy, and take a later step"
        )


@dataclass(frozen=True)
class Opened:
    """A model ready to run, and the folder its tokenizer and config are in."""

    model: Any
    folder: Path


def open_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Opened:
    """A model in hub format (folder or hub name), or a checkpoint of the trainer (a run folder: its newest step).

    Raises:
        ValueError: neither, or corrupt.
    """
    if _is_checkpoint(Path(path)):
        trained = open_checkpoint(path)
        return Opened(trained.model(dtype, device), trained.base_model)
    folder = models.resolve_folder(path)
    return Opened(models.load_model(folder, dtype, device=device), folder)


def folder_and_block(path: str | Path) -> tuple[Path, int | None]:
    """The folder with config and tokenizer of what :func:`open_model` opens, and the block size that a checkpoint was
    trained with.
    """
    if _is_checkpoint(Path(path)):
        trained = open_checkpoint(path)
        return trained.base_model, trained.run["data"]["student"]["block"]
    return models.resolve_folder(path), None


def generation_of(path: str | Path) -> str:
    """``block_diffusion`` or ``autoregressive``: how the model at ``path`` generates; only its ``config.json`` is read.

    Raises:
        ValueError: no model there, or of a model type that is unknown to this package and to transformers.
    """
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        return "block_diffusion"  # a checkpoint of the trainer is always of this kind
    return models.generation_of(models.resolve_folder(path))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CHECKSUMS).is_file() or any((step / CHECKSUMS).is_file() for step in step_folders(folder))


def step_folder(path: Path) -> Path:
    """A checkpoint's folder, or the newest checkpoint with checksums of a run's; ValueError where there is none."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; use a run folder or one of its {PREFIX}* folders")
    if any((path / name).is_file() for name in (STATE, CHECKSUMS)):
        return path
    steps = [folder for folder in step_folders(path) if (folder / CHECKSUMS).is_file()]
    if not steps:
        raise ValueError(
            f"{path}: no complete checkpoint ({PREFIX}*/{CHECKSUMS}) in this folder; has the run saved one yet?"
        )
    return steps[-1]


def _last_metrics(path: Path, step: int) -> dict[str, float]:
    """The newest value of each metric logged at or before ``step``; {} if there is no such file."""
    values: dict[str, float] = {}
    for _, entry in read_rows(path, bad=[]) if path.is_file() else ():  # a killed run leaves half a line
        numbers = {name: value for name, value in entry.items() if type(value) in (int, float)}
        if numbers.pop("step", step + 1) <= step:
            values |= numbers
    return values
