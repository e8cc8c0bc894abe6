"""The teacher's DeepSpeed JSON, found by the run's knobs and checked; nothing of a model is imported here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megatron_tide.config import TeacherConfig
from megatron_tide.ds_config import read_ds_config, section

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PLAINEST = {"zero3": "ds_configs/teacher_zero3.json", "pipeline": "ds_configs/teacher_pipeline_2.json"}
OFFLOADS = ("none", "cpu", "nvme")


def hosting_settings(teacher: TeacherConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a teacher's hosting, checked; {} for a resident one.

    Raises:
        ValueError: one line: which file or flag, what is wrong, the fix.
    """
    hosting, path = teacher.teacher_hosting, teacher.teacher_deepspeed
    if teacher.teacher_nvme and hosting != "zero3":
        raise ValueError(f"--teacher-nvme {teacher.teacher_nvme}: --teacher-hosting {hosting} puts nothing on disk")
    if hosting not in PLAINEST:
        if path:
            raise ValueError(
                f"--teacher-deepspeed {path}: a replicated teacher has none; give --teacher-hosting as well"
            )
        return {}
    path = path or PLAINEST[hosting]
    settings = read_ds_config(path, "--teacher-deepspeed")
    _CHECKS[hosting](settings, f"--teacher-deepspeed {path}", teacher, world_size)
    return settings


def _check_zero3(settings: dict[str, Any], where: str, teacher: TeacherConfig, world_size: int) -> None:
    zero = section(settings, "zero_optimization", where)
    if zero.get("stage") != 3:
        raise ValueError(f"{where}: zero_optimization.stage is {zero.get('stage')}; --teacher-hosting zero3 takes 3")
    offload = section(zero, "offload_param", where)
    device = offload.get("device", "none")
    if device not in OFFLOADS:
        raise ValueError(f"{where}: offload_param.device is {device!r}; it is one of {', '.join(OFFLOADS)}")
    if device != "nvme":
        if teacher.teacher_nvme:
            raise ValueError(f"--teacher-nvme {teacher.teacher_nvme}: {where} does not put the teacher on disk")
        return
    if teacher.teacher_nvme:
        offload["nvme_path"] = teacher.teacher_nvme
    folder = offload.get("nvme_path")
    if not folder or not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{where}: {folder} is no folder to write to; give --teacher-nvme, a folder on a fast disk")


def _check_pipeline(settings: dict[str, Any], where: str, teacher: TeacherConfig, world_size: int) -> None:
    stages = section(settings, "pipeline", where).get("stages")
    if not isinstance(stages, int) or stages < 1:
        raise ValueError(f"{where}: pipeline.stages is {stages!r}; it is the number of ranks that share the teacher")
    if section(settings, "zero_optimization", where).get("stage", 0) > 1:
        raise ValueError(f"{where}: a pipeline takes no ZeRO stage 2 or 3; remove zero_optimization")
    if world_size % stages:
        raise ValueError(
            f"{where}: {stages} stages cannot be shared out over {world_size} rank(s); start a multiple of {stages} "
            f"ranks, or take a file with other stages"
        )


_CHECKS = {"zero3": _check_zero3, "pipeline": _check_pipeline}
