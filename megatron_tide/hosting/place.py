"""From the run's knobs to a teacher in its place: build the host that they name."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TextIO
from uuid import uuid4

import torch

from megatron_tide.config import TeacherConfig
from megatron_tide.ds_config import offload_of
from megatron_tide.hosting.pipeline import PipelineTeacher
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.hosting.settings import DTYPES, hosting_settings
from megatron_tide.hosting.zero3 import Zero3Teacher
from megatron_tide.models import load_model, resolve_folder
from megatron_tide.models.checkpoint_keys import checkpoint_table, module_tensors, tied_aliases
from megatron_tide.models.layer_specs import LayerSpecs, layer_specs_of
from megatron_tide.models.load import check_keys, check_shapes
from megatron_tide.models.shards import ShardedFolder
from megatron_tide.objectives import Strategy

_OWN, _LOCK, _YOUNG_SECONDS = "megatron_tide-", ".lock", 60


class Ranks(Protocol):
    """What a host needs to know of the world."""

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def print_rank0(self, line: str) -> None: ...

    def broadcast_object(self, value: Any) -> Any: ...


_LAYERWISE: dict[str, Callable[..., Any]] = {"zero3": Zero3Teacher, "pipeline": PipelineTeacher}


def build_teacher(folder: str, teacher: TeacherConfig, strategy: Strategy, world: Ranks) -> Any:
    """The teacher of a folder, hosted as the knobs say; a collective of all ranks."""
    if teacher.teacher_hosting in _LAYERWISE:
        return host_layers(*open_layer_specs(folder), teacher, strategy, world)
    model = load_model(folder, DTYPES[teacher.teacher_dtype], device=str(world.device))
    return ReplicatedTeacher(model, strategy)


def host_layers(
    specs: LayerSpecs, source: ShardedFolder, teacher: TeacherConfig, strategy: Strategy, world: Ranks
) -> Any:
    """A teacher that is taken in section by section from ``source``; a collective of all ranks."""
    settings = hosting_settings(teacher, world.size)
    offload = offload_of(settings)
    if offload.get("device") == "nvme":
        offload["nvme_path"] = str(own_folder(Path(offload["nvme_path"]), world.broadcast_object(uuid4().hex[:12])))
    build, dtype = _LAYERWISE[teacher.teacher_hosting], DTYPES[teacher.teacher_dtype]
    return build(specs, source, dtype, strategy, settings, world.device, world.print_rank0)


def open_layer_specs(folder: str) -> tuple[LayerSpecs, ShardedFolder]:
    """A teacher's sections and its checkpoint, which holds exactly their tensors (else ValueError).

    Every rank looks at all of it, headers only: a rank that found a mistake later would leave the others waiting.
    """
    path = resolve_folder(folder)
    specs, source = layer_specs_of(path), ShardedFolder(path)
    tensors = module_tensors(specs.model)
    table = checkpoint_table(tensors, specs.family)
    check_keys(source, set(table), set(tied_aliases(specs.model)))
    check_shapes(source, table, tensors)
    return specs, source


def own_folder(disk: Path, name: str) -> Path:
    """A folder of this run's own on the disk that hosts the teacher, gone when the run ends.

    Two runs on a node do not meet there, and what a killed run has left (its lock is free again) is removed.
    """
    for old in disk.glob(f"{_OWN}*"):
        with contextlib.suppress(OSError), (old / _LOCK).open() as lock:
            if time.time() - old.stat().st_mtime > _YOUNG_SECONDS:  # a younger one may be about to take its lock
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
    own = disk / f"{_OWN}{name}"
    own.mkdir(exist_ok=True)
    held = (own / _LOCK).open("a")
    fcntl.flock(held, fcntl.LOCK_SH)
    atexit.register(_leave, own, held)
    return own


def _leave(own: Path, held: TextIO) -> None:
    shutil.rmtree(own, ignore_errors=True)
    held.close()
