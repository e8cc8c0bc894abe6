"""Topology-free checkpoints, written and restored; :mod:`megatron_tide.training_checkpoint` describes the folder.

A checkpoint is written under a temporary name, flushed to disk, checksummed and renamed: a run that dies at any moment
leaves the earlier checkpoints intact. Any ZeRO stage, offload and world size reads what any other wrote.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from megatron_tide.files import AtomicFolder, remove_drafts, sha256_files
from megatron_tide.models.shards import save_tensors
from megatron_tide.ranks import on_main
from megatron_tide.screen import words_of
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.engine import full_master_weight, full_moment, moments, restore_state, trained_parameters
from megatron_tide.training_checkpoint import (
    CHECKSUMS,
    PREFIX,
    STATE,
    WEIGHTS,
    TrainState,
    read_description,
    step_folders,
)


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    return run_folder / f"{PREFIX}{step:08d}"


def save(run_folder: Path, engine: Any, state: TrainState, run: dict[str, Any], world: DistContext, keep: int) -> Path:
    """Write one checkpoint (a collective), then remove all but the newest ``keep``.

    Raises:
        OSError: on every rank, when rank 0 could not write; the earlier checkpoints are untouched.
    """
    final = checkpoint_folder(run_folder, state.step)
    folder = AtomicFolder(final)
    error: OSError | None = None
    if world.is_main:
        error = _attempt(folder.open)
    for file, tensors in _gathered(engine, world):
        if world.is_main and error is None:
            error = _attempt(lambda f=file, t=tensors: save_tensors(t, folder.draft / f))
        del tensors
    if world.is_main and error is None:
        described = {"state": asdict(state), "run": run}
        error = _attempt(lambda: _seal(folder, described))

    def check() -> None:
        if error is not None:
            folder.discard()
            raise OSError(
                f"could not save {final}: {error}; free disk space and run the same command again: "
                "--resume auto continues from the newest complete checkpoint"
            )

    on_main(world, check)
    if world.is_main and (left := _attempt(lambda: _prune(run_folder, final, keep))):
        world.print_rank0(f"warning: an old checkpoint cannot be removed ({left})")
    return final


def restore(folder: Path, engine: Any) -> TrainState:
    """Load a checkpoint into the engine's partitions; each rank reads its own part.

    Raises:
        ValueError: when its parameters differ from this model's, or a file is no such checkpoint's.
    """
    described = read_description(folder)["state"]
    state = TrainState(**{field.name: described[field.name] for field in fields(TrainState)})
    stored = StoredTensors(folder, {name: p.shape for name, p in trained_parameters(engine)}, moments(engine))
    restore_state(engine, stored.weights, stored.moments, state.step)
    return state


class StoredTensors:
    """Weights and moments of a checkpoint, read one at a time; their names and shapes are checked first.

    ``shapes``: of the parameters; ``having``: of each moment, the parameters that have it.

    Raises:
        ValueError: names the file that cannot be read, or is of another model or optimizer.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Sequence[int]], having: Mapping[str, Collection[str]]
    ) -> None:
        self.weights = _Lazy(folder / WEIGHTS, shapes, "--student")
        self.moments = {
            moment: _Lazy(folder / f"{moment}.safetensors", {name: shapes[name] for name in names}, "--optimizer")
            for moment, names in having.items()
        }


class _Lazy:
    """The fp32 tensors of a safetensors file that should have ``shapes``; ``flag``: what would explain others."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]], flag: str) -> None:
        if not path.is_file():
            raise ValueError(f"{path}: missing from the checkpoint; check {flag}, or use another checkpoint")
        try:
            self._file = safe_open(path, "pt")
            parts = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118  # it is no mapping
            found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in parts.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); use another checkpoint") from None
        wanted = {name: ("F32", list(shape)) for name, shape in shapes.items()}
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if odd:
            raise ValueError(f"{path}: parameters of another model (first difference: {odd[0][:80]}); check {flag}")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)


def _gathered(engine: Any, world: DistContext) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(file, tensors) one file at a time; a collective, only rank 0 keeps the tensors."""
    parameters = dict(trained_parameters(engine))
    yield WEIGHTS, _collect(parameters, world, full_master_weight)
    for moment, names in moments(engine).items():
        having = {name: parameter for name, parameter in parameters.items() if name in names}
        yield f"{moment}.safetensors", _collect(having, world, lambda p, m=moment: full_moment(p, m))


def _collect(parameters: dict[str, nn.Parameter], world: DistContext, gather: Any) -> dict[str, torch.Tensor]:
    kept = {}
    for name, parameter in parameters.items():
        full = gather(parameter)
        if world.is_main:
            kept[name] = full.detach().to("cpu", torch.float32).contiguous()
    return kept


def _attempt(write: Any) -> OSError | None:
    try:
        write()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever it is, the other ranks wait in the next collective
        return OSError(words_of(error))
    return None


def _seal(folder: AtomicFolder, description: dict[str, Any]) -> None:
    (folder.draft / STATE).write_text(json.dumps(description, indent=1, sort_keys=True))
    paths = sorted(folder.draft.iterdir())
    checksums = {path.name: found for path, found in zip(paths, sha256_files(paths))}
    (folder.draft / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
    folder.commit()


def _prune(run_folder: Path, newest: Path, keep: int) -> None:
    """Remove the complete checkpoints before ``newest``, but for ``keep - 1`` of them. Anything else is left alone:
    links, folders of other names, and later steps (corrupt ones, which resuming went past).
    """
    steps = [folder for folder in step_folders(run_folder) if folder.name <= newest.name]
    for old in [folder for folder in steps if (folder / CHECKSUMS).is_file()][:-keep]:
        for path in (old / CHECKSUMS, old / STATE, *old.glob("*.safetensors")):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it has files of the user
            old.rmdir()
    remove_drafts(run_folder, PREFIX)
