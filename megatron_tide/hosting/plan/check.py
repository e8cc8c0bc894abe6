"""From a run's knobs to its plan, and the trainer's refusal of a run that cannot fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from megatron_tide.config import DistillConfig, StrategyConfig
from megatron_tide.data.prepared import Stats
from megatron_tide.ds_config import offload_of, read_ds_config
from megatron_tide.hosting.plan.fit import Hosting, advice, every_hosting, plan, plans
from megatron_tide.hosting.plan.job import Job, Model, staircase_length
from megatron_tide.hosting.plan.machine import Machine, this_machine
from megatron_tide.hosting.settings import DTYPES, hosting_settings
from megatron_tide.models.shards import INDEX, SINGLE
from megatron_tide.objectives import STRATEGIES, Strategy

MANY_STEPS = 10**6  # of a run whose length is given in epochs


class Ranks(Protocol):
    """What the check needs to know of the world."""

    @property
    def size(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    def broadcast_object(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class Asked:
    """What a strategy asks the teacher for (gold log-probs, hidden rows, two halves), of samples of what length."""

    gold: bool
    hidden: bool
    compdemo: bool
    student_tokens: int
    teacher_tokens: int


def asked_of(knobs: StrategyConfig, shared: bool, student_tokens: int, teacher_tokens: int) -> Asked:
    """What a strategy asks, as far as its knobs tell without a bridge; ``shared``: whether the vocabularies are one."""
    recipe = STRATEGIES[knobs.strategy]
    if recipe.where_vocabularies_differ is not None and not shared:
        recipe = recipe.where_vocabularies_differ
    gold = (knobs.chunk_objective or recipe.chunk) != "none"
    hidden = (knobs.distribution_objective or recipe.distribution) != "none"
    halves = recipe.compdemo if knobs.compdemo is None else knobs.compdemo
    return Asked(gold, hidden, halves and (gold or hidden), student_tokens, teacher_tokens)


# Positions that a sample of so many tokens takes in the teacher's input, by --teacher-context.
POSITIONS: dict[str, Callable[[int, int], int]] = {
    "full": lambda tokens, block: -(-tokens // block) * block,
    "block_causal": lambda tokens, block: -(-tokens // block) * block,
    "staircase": staircase_length,
}


def job_of(config: DistillConfig, ranks: int, asked: Asked) -> Job:
    """The run that ``config`` describes, on ``ranks`` ranks.

    Raises:
        ValueError: a model's config.json that cannot be read, or batches that cannot be dealt to the ranks.
    """
    train, paths = config.train, config.paths
    student = Model(model_config(paths.student))
    teacher = Model(model_config(paths.teacher)) if asked.gold or asked.hidden else None
    forwards, rest = divmod(train.global_batch_size, train.micro_batch_size * ranks)
    if rest or not forwards:
        raise ValueError(
            f"--global-batch-size {train.global_batch_size} is not a multiple of "
            f"--micro-batch-size {train.micro_batch_size} x {ranks} ranks"
        )
    teacher_block = teacher.config.block_size if teacher else 1
    steps = train.max_steps or MANY_STEPS
    return Job(
        student=student,
        teacher=teacher,
        ranks=ranks,
        micro_batch_size=train.micro_batch_size,
        accumulation=forwards,
        student_tokens=asked.student_tokens,
        student_length=staircase_length(asked.student_tokens, student.config.block_size),
        teacher_tokens=asked.teacher_tokens,
        teacher_length=POSITIONS[config.strategy.teacher_context](asked.teacher_tokens, teacher_block),
        halves=2 if asked.compdemo else 1,
        gold=asked.gold,
        hidden=asked.hidden,
        precision=DTYPES[train.precision],
        teacher_dtype=DTYPES[config.teacher.teacher_dtype],
        recompute=train.activation_checkpointing,
        deepspeed=read_ds_config(train.deepspeed, "--deepspeed"),
        steps=steps,
        checkpoints=min(-(-steps // config.save.save_every), config.save.keep_last + 1),
        stored_bytes=_largest_file(paths.teacher) if teacher else 0,
    )


def model_config(path: str) -> Path:
    """The ``config.json`` of a folder, a file that is one, or a hub name's, fetched without its weights."""
    found = Path(path)
    if found.exists():
        return found / "config.json" if found.is_dir() else found
    try:
        return Path(hf_hub_download(path, "config.json"))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: no such folder, and the hub does not give its config.json ({reason})") from None


def _largest_file(path: str) -> int:
    folder = Path(path)
    files = [folder / SINGLE] if not (folder / INDEX).exists() else list(folder.glob("*.safetensors"))
    return max((file.stat().st_size for file in files if file.exists()), default=0)


def check_plan(config: DistillConfig, strategy: Strategy, stats: Stats, world: Ranks) -> None:
    """Refuse a run that cannot fit on the first rank's machine, on every rank alike; nothing is allocated.

    ``stats``: of the prepared samples; the longest one decides.

    Raises:
        ValueError: one line: what is too small, by how much, and the flags with which the run would fit.
    """
    if config.teacher.skip_plan:
        return
    longest = int(stats.student_length.max()), int(stats.teacher_length.max())
    asked = Asked(strategy.needs_target_logprobs, strategy.needs_hidden, strategy.compdemo is not None, *longest)
    refusal = world.broadcast_object(_refusal(config, asked, world.size) if world.is_main else None)
    if refusal:
        raise ValueError(refusal)


def _refusal(config: DistillConfig, asked: Asked, ranks: int) -> str:
    """Why a run does not fit here, or cannot be planned; "" for one that fits."""
    try:
        job = job_of(config, ranks, asked)
        knobs = config.teacher
        settings = hosting_settings(knobs, ranks) if job.teacher else {}
        machine = local_machine(ranks, nvme_folder(settings, knobs.teacher_nvme))
        own = Hosting(knobs.teacher_deepspeed or knobs.teacher_hosting, knobs.teacher_hosting, "", settings)
        mine = plan(job, machine, own)
    except (ValueError, OSError) as error:
        return str(error)
    if mine.fits:
        return ""
    line = f"--teacher-hosting {own.kind} does not fit: " if job.teacher else "this run does not fit: "
    return f"{line}{mine.complaint()}; {advice(job, machine, plans(job, machine))} (--skip-plan goes on regardless)"


def local_machine(ranks: int, disk: Path | None) -> Machine:
    """This node and its like, as a launcher's environment describes them to ``ranks`` ranks."""
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, the deepspeed launcher's
    gpus = torch.cuda.device_count()
    local = int(here) if here else min(ranks, gpus or ranks)
    return this_machine(local, max(1, ranks // local), disk)


def nvme_folder(settings: dict[str, Any], given: str) -> Path | None:
    """The folder on disk that a teacher would use: a hosting's own, the one given, or what the ds_configs file says."""
    hostings = [settings, *(hosting.settings for hosting in every_hosting())]
    offloads = [offload_of(hosting) for hosting in hostings]
    named = [given, *(offload["nvme_path"] for offload in offloads if "nvme_path" in offload)]
    return next((Path(folder) for folder in named if folder and Path(folder).is_dir()), None)
