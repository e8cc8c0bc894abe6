"""Build a teacher from the flags: the hosting they name, its DeepSpeed JSON (checked), and its backend.

Importing this file imports no model code, so that a dry run can check a hosting quickly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tide.bounds import shown
from megatron_tide.choices import TEACHER_HOSTINGS
from megatron_tide.config import CACHED, TeacherConfig
from megatron_tide.ds_config import offload_of, read_ds_config, section
from megatron_tide.ds_ops import refuse_missing_disk_tools
from megatron_tide.hosting.backend import NoTeacher, Ranks, TeacherBackend
from megatron_tide.objectives import Strategy

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OFFLOADS = ("none", "cpu", "nvme")


@dataclass(frozen=True, kw_only=True)
class Hosting:
    """Where a teacher's weights are: a ``--teacher-hosting`` name and its DeepSpeed JSON ({} where it has none; of
    cached ``{"cache": FOLDER}``)."""

    name: str
    settings: dict[str, Any]

    @property
    def flags(self) -> str:
        return f"--teacher-hosting {self.name}"


def named_hosting(name: str) -> Hosting:
    """zero3... is ds_configs/teacher_NAME.json; pipeline_N is N stages."""
    if name.startswith("zero3"):
        return Hosting(name=name, settings=read_ds_config(f"ds_configs/teacher_{name}.json", "--teacher-hosting"))
    if name.startswith("pipeline"):
        return Hosting(name=name, settings={"pipeline": {"stages": int(name.partition("_")[2])}})
    return Hosting(name=name, settings={})


REPLICATED = named_hosting("replicated")


def every_hosting() -> list[Hosting]:
    """Those that have weights."""
    return [named_hosting(name) for name in TEACHER_HOSTINGS if name != CACHED]


def hosting_of(teacher: TeacherConfig, ranks: int) -> Hosting:
    """The hosting that the flags describe, for so many ranks.

    Raises:
        ValueError: one line: which flag or file, what is wrong, the fix.
    """
    name, file, nvme = teacher.teacher_hosting, teacher.teacher_deepspeed, teacher.teacher_nvme
    if (name == CACHED) != bool(teacher.teacher_cache):
        raise ValueError("--teacher-hosting cached and --teacher-cache DIR (made by the cache command) go together")
    if name == CACHED:
        return Hosting(name=CACHED, settings={"cache": teacher.teacher_cache})
    if file:
        where, settings = f"--teacher-deepspeed {file}", read_ds_config(file, "--teacher-deepspeed")
        found = _described(settings, where)
    else:
        name = name or REPLICATED.name
        where, settings = f"--teacher-hosting {name}", named_hosting(name).settings
        found = _described(settings, where) if settings else name
    if name not in (None, found):
        raise ValueError(f"{where} describes {found}, not --teacher-hosting {name}; use one of the two flags")
    offload = offload_of(settings)
    if offload.get("device") == "nvme":
        offload["nvme_path"] = folder = nvme or offload.get("nvme_path")
        if not folder or not Path(folder).is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{where}: {folder} is not a writable folder; set --teacher-nvme to one on a fast disk")
        refuse_missing_disk_tools()
    elif nvme:
        raise ValueError(f"--teacher-nvme {nvme}: {where} does not use a disk; use --teacher-hosting zero3_nvme")
    stages = settings.get("pipeline", {}).get("stages", 1)
    if ranks % stages:
        raise ValueError(
            f"{where}: {ranks} rank(s) cannot be split into pipelines of {stages} stages; start a multiple of {stages} "
            f"ranks, or use another hosting"
        )
    return Hosting(name=found, settings=settings)


def _described(settings: dict[str, Any], where: str) -> str:
    """The name of the hosting that a DeepSpeed JSON describes; ValueError where it describes none."""
    stage = section(settings, "zero_optimization", where).get("stage")
    if "pipeline" in settings:
        stages = section(settings, "pipeline", where).get("stages")
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(f"{where}: pipeline.stages is {stages!r}; it must be the number of ranks per pipeline")
        if stage not in (None, 0, 1):
            raise ValueError(f"{where}: a pipeline cannot use ZeRO stage 2 or 3; remove zero_optimization")
        return f"pipeline_{stages}"
    if stage != 3:
        raise ValueError(f"{where}: zero_optimization.stage is {shown(stage)}; a sharded teacher needs 3")
    device = section(settings["zero_optimization"], "offload_param", where).get("device", "none")
    if device not in OFFLOADS:
        raise ValueError(f"{where}: offload_param.device is {device!r}; use one of {', '.join(OFFLOADS)}")
    return "zero3" if device == "none" else f"zero3_{device}"


def build_teacher(folder: str, teacher: TeacherConfig, strategy: Strategy, ranks: Ranks) -> TeacherBackend:
    """The teacher of a folder, in the hosting that the flags select; a collective call of all ranks."""
    if not strategy.needs_teacher:
        return NoTeacher()
    hosting = hosting_of(teacher, ranks.size)
    name = hosting.name if hosting.name in TEACHER_HOSTINGS else "pipeline_2"  # a file with another number of stages
    return TEACHER_HOSTINGS[name].open(folder, hosting.settings, DTYPES[teacher.teacher_dtype], strategy, ranks)
