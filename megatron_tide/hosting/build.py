"""From the flags to a teacher: the hosting they name, its DeepSpeed JSON (checked), and the backend built from it.

Importing this file imports no model code, so that a dry run can check a hosting quickly.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import fcntl
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from uuid import uuid4

import torch

from megatron_tide.config import TEACHER_HOSTINGS, TeacherConfig
from megatron_tide.ds_config import offload_of, read_ds_config, section
from megatron_tide.hosting.backend import NoTeacher, Ranks, ReplicatedTeacher, TeacherBackend
from megatron_tide.objectives import Strategy

if TYPE_CHECKING:
    from megatron_tide.models.layer_specs import LayerSpecs
    from megatron_tide.models.shards import ShardedFolder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OFFLOADS = ("none", "cpu", "nvme")
_OWN, _LOCK, _YOUNG_SECONDS = "megatron_tide-", ".lock", 60


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """Where a teacher's weights are: a ``--teacher-hosting`` name and its DeepSpeed JSON ({} where it has none)."""

    name: str
    settings: dict[str, Any]

    @property
    def flags(self) -> str:
        return f"--teacher-hosting {self.name}"

    @property
    def kind(self) -> str:
        """A key of :data:`BACKENDS`: the first word of the name."""
        return self.name.partition("_")[0]


REPLICATED = Hosting(name="replicated", settings={})


def named_hosting(name: str) -> Hosting:
    """zero3... is ds_configs/teacher_NAME.json; pipeline_N is N stages."""
    kind, _, rest = name.partition("_")
    if kind == "zero3":
        return Hosting(name=name, settings=read_ds_config(f"ds_configs/teacher_{name}.json", "--teacher-hosting"))
    return Hosting(name=name, settings={"pipeline": {"stages": int(rest)}} if kind == "pipeline" else {})


def every_hosting() -> list[Hosting]:
    return [named_hosting(name) for name in TEACHER_HOSTINGS]


def hosting_of(teacher: TeacherConfig, ranks: int) -> Hosting:
    """The hosting that the flags describe, for so many ranks.

    Raises:
        ValueError: one line: which flag or file, what is wrong, the fix.
    """
    name, file, nvme = teacher.teacher_hosting, teacher.teacher_deepspeed, teacher.teacher_nvme
    if file:
        where, settings = f"--teacher-deepspeed {file}", read_ds_config(file, "--teacher-deepspeed")
    else:
        name = name or "replicated"
        where, settings = f"--teacher-hosting {name}", named_hosting(name).settings
    found = _described(settings, where) if file or settings else "replicated"
    if name not in (None, found):
        raise ValueError(f"{where} describes {found}, not --teacher-hosting {name}: give one of the two flags")
    offload = offload_of(settings)
    if offload.get("device") == "nvme":
        offload["nvme_path"] = folder = nvme or offload.get("nvme_path")
        if not folder or not Path(folder).is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{where}: {folder} is not a writable folder; give --teacher-nvme, one on a fast disk")
    elif nvme:
        raise ValueError(f"--teacher-nvme {nvme}: {where} puts nothing on disk; take --teacher-hosting zero3_nvme")
    stages = settings.get("pipeline", {}).get("stages", 1)
    if ranks % stages:
        raise ValueError(
            f"{where}: {ranks} rank(s) cannot be split into pipelines of {stages} stages; start a multiple of {stages} "
            f"ranks, or take another hosting"
        )
    return Hosting(name=found, settings=settings)


def _described(settings: dict[str, Any], where: str) -> str:
    """The name of the hosting that a DeepSpeed JSON describes; ValueError where it describes none."""
    stage = section(settings, "zero_optimization", where).get("stage")
    if "pipeline" in settings:
        stages = section(settings, "pipeline", where).get("stages")
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(f"{where}: pipeline.stages is {stages!r}; it is the number of ranks of a pipeline")
        if stage not in (None, 0, 1):
            raise ValueError(f"{where}: a pipeline takes no ZeRO stage 2 or 3; remove zero_optimization")
        return f"pipeline_{stages}"
    if stage != 3:
        raise ValueError(f"{where}: zero_optimization.stage is {stage}; a sharded teacher takes 3")
    device = section(settings["zero_optimization"], "offload_param", where).get("device", "none")
    if device not in OFFLOADS:
        raise ValueError(f"{where}: offload_param.device is {device!r}; it is one of {', '.join(OFFLOADS)}")
    return "zero3" if device == "none" else f"zero3_{device}"


def build_teacher(folder: str, teacher: TeacherConfig, strategy: Strategy, ranks: Ranks) -> TeacherBackend:
    """The teacher of a folder, hosted as the flags say; a collective call of all ranks."""
    if not strategy.needs_teacher:
        return NoTeacher()
    hosting = hosting_of(teacher, ranks.size)
    return BACKENDS[hosting.kind](folder, hosting, DTYPES[teacher.teacher_dtype], strategy, ranks)


def _replicated(folder: str, hosting: Hosting, dtype: torch.dtype, strategy: Strategy, ranks: Ranks) -> TeacherBackend:
    from megatron_tide.models import load_model

    return ReplicatedTeacher(load_model(folder, dtype, device=str(ranks.device)), strategy)


def _layerwise(folder: str, hosting: Hosting, dtype: torch.dtype, strategy: Strategy, ranks: Ranks) -> TeacherBackend:
    from megatron_tide.hosting.layerwise import open_layer_specs

    return build_layerwise(*open_layer_specs(folder), hosting, dtype, strategy, ranks)


BACKENDS: dict[str, Callable[..., TeacherBackend]] = {
    "replicated": _replicated,
    "zero3": _layerwise,
    "pipeline": _layerwise,
}


def build_layerwise(
    specs: LayerSpecs,
    source: ShardedFolder,
    hosting: Hosting,
    dtype: torch.dtype,
    strategy: Strategy,
    ranks: Ranks,
) -> TeacherBackend:
    """A teacher that is loaded layer by layer from ``source``; a collective call of all ranks."""
    from megatron_tide.hosting.pipeline import PipelineTeacher
    from megatron_tide.hosting.zero3 import Zero3Teacher

    settings = copy.deepcopy(hosting.settings)
    offload = offload_of(settings)
    if offload.get("device") == "nvme":
        offload["nvme_path"] = str(own_folder(Path(offload["nvme_path"]), ranks.broadcast_object(uuid4().hex[:12])))
    backend = PipelineTeacher if hosting.kind == "pipeline" else Zero3Teacher
    return backend(specs, source, dtype, strategy, settings, ranks)


def own_folder(disk: Path, name: str) -> Path:
    """A folder of this run's own on the disk that holds the teacher, removed when the run ends.

    Two runs on a node do not share one, and what a killed run has left (its lock is free again) is removed.
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
