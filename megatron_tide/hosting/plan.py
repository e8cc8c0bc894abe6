"""Which hostings of the teacher fit a machine, which is fastest, and the refusal of a run that cannot fit.

The plan command prints :func:`plans` for any machine; the trainer calls :func:`check_plan` on the one it runs on.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tide.config import CACHED, DistillConfig, StrategyConfig
from megatron_tide.data.prepared import Stats
from megatron_tide.ds_config import offload_of
from megatron_tide.fast import GIB
from megatron_tide.hosting.backend import Ranks
from megatron_tide.hosting.build import REPLICATED, Hosting, every_hosting, hosting_of
from megatron_tide.hosting.memory import (
    CUDA_CONTEXT,
    Machine,
    ModelShape,
    Peak,
    RunShape,
    TeacherNeeds,
    estimate_memory,
)
from megatron_tide.hosting.speed import RATES, Rates, StepTime, step_time, teacher_seconds
from megatron_tide.hub import check_hub_name, download
from megatron_tide.machine import free_memory, rss_bytes
from megatron_tide.objectives import STRATEGIES, Strategy


@dataclass(frozen=True)
class Plan:
    """A hosting on a machine: the peak of each place, bytes per node on disk, the teacher's seconds per step.

    ``gpu`` is None where there is none.
    """

    hosting: Hosting
    machine: Machine
    gpu: Peak | None
    host: Peak
    disk: dict[str, int]
    seconds: float

    @property
    def places(self) -> dict[str, tuple[Peak, int]]:
        """What each place needs, and the bytes it has. On disk only the teacher counts."""
        found = {"host memory": (self.host, self.machine.host_bytes)}
        if self.gpu is not None:
            found["each GPU"] = self.gpu, self.machine.gpu_bytes
        if "teacher weights" in self.disk:
            teacher = {"teacher weights": self.disk["teacher weights"]}
            found["disk"] = Peak("teacher loading", teacher), self.machine.disk_bytes
        return found

    @property
    def lacks(self) -> dict[str, int]:
        """Missing bytes of each place that is too small."""
        return {place: peak.bytes - has for place, (peak, has) in self.places.items() if peak.bytes > has}

    @property
    def fits(self) -> bool:
        return not self.lacks

    def complaint(self) -> str:
        """What is too small, and by how much: one line."""
        lines = []
        for place, lack in self.lacks.items():
            peak, has = self.places[place]
            part, size = max(peak.parts.items(), key=lambda item: item[1])
            lines.append(
                f"{place}: needs {peak.bytes / GIB:.1f} GiB, has {has / GIB:.1f}, {lack / GIB:.1f} too little "
                f"(in the {peak.phase}; largest part: {part}, {size / GIB:.1f})"
            )
        return " and ".join(lines)


def plan(run: RunShape, machine: Machine, hosting: Hosting, rates: Rates = RATES, *, trains: bool = True) -> Plan:
    """One hosting on one machine, with the student (``trains``) or the teacher alone.

    Raises:
        ValueError: more pipeline stages than the teacher has layers.
    """
    estimate = estimate_memory(run, machine, hosting.settings, trains=trains)
    return Plan(
        hosting=hosting,
        machine=machine,
        gpu=estimate.peak(host=False) if machine.has_gpus else None,
        host=estimate.peak(host=True),
        disk=estimate.disk,
        seconds=teacher_seconds(run, run.teacher, machine, hosting.settings, rates) if run.teacher else 0.0,
    )


def plans(run: RunShape, machine: Machine, rates: Rates = RATES) -> list[Plan]:
    """Every hosting that this many ranks can have: those that fit first, the fastest first."""
    if run.teacher is None:
        return [plan(run, machine, replace(REPLICATED, name="no teacher"), rates)]
    parts, found = len(run.teacher.widths) + 2, []
    for hosting in every_hosting():
        stages = hosting.settings.get("pipeline", {}).get("stages", 1)
        if run.ranks % stages == 0 and stages <= parts:
            found.append(plan(run, machine, hosting, rates))
    return sorted(found, key=lambda item: (not item.fits, item.seconds))


@dataclass(frozen=True)
class ClusterTime:
    """A run on so many GPUs: the links between them, the hosting expected to be the fastest (None: none fits)."""

    gpus: int
    links: str
    hosting: str | None
    micro_batch: int
    step: StepTime
    tokens_per_second: float


def cluster_times(run: RunShape, machine: Machine, rates: Rates = RATES) -> list[ClusterTime]:
    """The run on 1, 8 and 64 GPUs like the machine's, by NVLink or Ethernet, where its batch is large enough for them.

    Micro-batches are as large as the flags say, or as the global batch leaves for a rank.
    """
    found, train = [], run.config.train
    nvlink, ethernet = ("NVLink", rates.nvlink_gbs), ("100 Gb Ethernet", rates.node_gbs)
    for gpus, (links, link_gbs) in ((1, ("", 1.0)), (8, nvlink), (8, ethernet), (64, nvlink), (64, ethernet)):
        per_rank = train.global_batch_size // gpus
        if per_rank * gpus != train.global_batch_size or not per_rank:
            continue
        micro = max(size for size in range(1, min(train.micro_batch_size, per_rank) + 1) if per_rank % size == 0)
        config = replace(run.config, train=replace(train, micro_batch_size=micro))
        here, own = replace(run, config=config, ranks=gpus), replace(rates, gather_gbs=link_gbs, hop_gbs=link_gbs)
        local = min(gpus, 8 if links == nvlink[0] or gpus > 8 else 1)
        best = plans(here, replace(machine, ranks=local, nodes=gpus // local), own if links else rates)[0]
        step = step_time(here, best.seconds, rates, link_gbs)
        tokens = train.global_batch_size * run.needs.student_tokens / step.total
        found.append(ClusterTime(gpus, links, best.hosting.name if best.fits else None, micro, step, tokens))
    return found


def closest(found: Sequence[Plan]) -> Plan:
    """The plan that does not fit but has the least missing memory in its worst place."""
    return min(found, key=lambda item: max(item.lacks.values()))


# Flags of training that save memory, the cheapest first; none changes the curve.
SAVINGS: dict[str, dict[str, Any]] = {
    "--activation-checkpointing": {"activation_checkpointing": True},
    "--micro-batch-size 1": {"micro_batch_size": 1},
    "--deepspeed ds_configs/zero2_offload.json": {"deepspeed": "ds_configs/zero2_offload.json"},
}


def with_savings(run: RunShape, machine: Machine, rates: Rates = RATES) -> tuple[tuple[str, ...], list[Plan]]:
    """The fewest of :data:`SAVINGS` with which a hosting fits, all where none does; and the plans with them."""
    train = run.config.train
    useful = [flag for flag, values in SAVINGS.items() if replace(train, **values) != train]
    for count in range(len(useful) + 1):
        for flags in itertools.combinations(useful, count):
            values = {name: value for flag in flags for name, value in SAVINGS[flag].items()}
            found = plans(replace(run, config=replace(run.config, train=replace(train, **values))), machine, rates)
            if found[0].fits:
                return flags, found
    return flags, found


def teacher_needs(flags: StrategyConfig, shared: bool, student_tokens: int, teacher_tokens: int) -> TeacherNeeds:
    """What a strategy needs from the teacher, by its flags, without a bridge; ``shared``: equal vocabularies."""
    spec = STRATEGIES[flags.strategy]
    if spec.where_vocabularies_differ is not None and not shared:
        spec = spec.where_vocabularies_differ
    chunk = (flags.chunk_objective or spec.chunk) != "none"
    distribution = (flags.distribution_objective or spec.distribution) != "none"
    compdemo = spec.compdemo if flags.compdemo is None else flags.compdemo
    return TeacherNeeds(
        target_logprobs=chunk,
        hidden=distribution,
        compdemo=compdemo and (chunk or distribution),
        student_tokens=student_tokens,
        teacher_tokens=teacher_tokens,
    )


def run_shape(config: DistillConfig, ranks: int, needs: TeacherNeeds) -> RunShape:
    """The run that ``config`` describes.

    Raises:
        ValueError: a model's config.json cannot be read, or the batch is not a multiple of the ranks' micro-batches.
    """
    train, paths = config.train, config.paths
    student = ModelShape(model_config(paths.student), as_student=True)
    hosted = (needs.target_logprobs or needs.hidden) and config.teacher.teacher_hosting != CACHED
    teacher = ModelShape(model_config(paths.teacher)) if hosted else None
    if train.global_batch_size % (train.micro_batch_size * ranks):
        raise ValueError(
            f"--global-batch-size {train.global_batch_size} is not a multiple of "
            f"--micro-batch-size {train.micro_batch_size} x {ranks} ranks"
        )
    return RunShape(config=config, ranks=ranks, needs=needs, student=student, teacher=teacher)


def model_config(path: str) -> Path:
    """The ``config.json`` of a folder, a file that is one, or a hub name's, downloaded without its weights."""
    found = Path(path)
    if found.exists():
        return found / "config.json" if found.is_dir() else found
    check_hub_name(path)
    what = f"{path}: no such folder, and its config.json is not found on the hub"
    return download(path, ["config.json"], what) / "config.json"


def check_plan(config: DistillConfig, strategy: Strategy, stats: Stats, world: Ranks) -> None:
    """Refuse, on all ranks, a run that cannot fit on the first rank's machine; nothing is allocated.

    ``stats``: of the prepared samples; the longest one determines the memory.

    Raises:
        ValueError: one line: what is too small, by how much, and the flags with which the run would fit.
    """
    if config.teacher.skip_plan:
        return
    needs = TeacherNeeds(
        target_logprobs=strategy.needs_target_logprobs,
        hidden=strategy.needs_hidden,
        compdemo=strategy.compdemo is not None,
        student_tokens=int(stats.student_length.max()),
        teacher_tokens=int(stats.teacher_length.max()),
    )
    refusal = world.broadcast_object(_refusal(config, needs, world.size) if world.is_main else None)
    if refusal:
        raise ValueError(refusal)


def _refusal(config: DistillConfig, needs: TeacherNeeds, ranks: int) -> str:
    """Why a run does not fit here, or cannot be planned; "" for one that fits."""
    try:
        run, flags = run_shape(config, ranks, needs), config.teacher
        hosting = hosting_of(flags, ranks) if run.teacher else REPLICATED
        machine = local_machine(ranks, nvme_folder(hosting.settings, flags.teacher_nvme))
        own = plan(run, machine, hosting)
    except (ValueError, OSError) as error:
        return str(error)
    if own.fits:
        return ""
    savings, found = with_savings(run, machine)
    if found[0].fits:
        hint = f"this would fit: {' '.join([*savings, *([found[0].hosting.flags] if run.teacher else [])])}"
    else:
        near, after = closest(found), f" with {' '.join(savings)}" if savings else ""
        hint = f"nothing would fit here; closest is {near.hosting.name}{after}: {near.complaint()}"
    what = f"--teacher-hosting {own.hosting.name}" if run.teacher else "this run"
    return f"{what} does not fit: {own.complaint()}; {hint} (--skip-plan skips this check)"


def nvme_folder(settings: dict[str, Any], given: str) -> Path | None:
    """The folder on disk for the teacher: from the hosting's JSON, from the flag, or from the ds_configs file."""
    offloads = [offload_of(item) for item in (settings, *(hosting.settings for hosting in every_hosting()))]
    named = [given, *(offload["nvme_path"] for offload in offloads if "nvme_path" in offload)]
    return next((Path(folder) for folder in named if folder and Path(folder).is_dir()), None)


def local_machine(ranks: int, disk: Path | None) -> Machine:
    """The machine of this run (equal nodes), for ``ranks`` ranks in total, as the launcher's environment describes it.

    What this process and its GPU's context hold by now counts as free: it is part of a plan. ``disk``: a folder for
    the teacher.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # torchrun's, the deepspeed launcher's
    gpus = torch.cuda.device_count()
    local = int(here) if here else min(ranks, gpus or ranks)
    gpu_bytes = 0
    if gpus:
        free, total = torch.cuda.mem_get_info()
        gpu_bytes = min(total, free + int(CUDA_CONTEXT))
    return Machine(
        ranks=local,
        gpu_bytes=gpu_bytes,
        host_bytes=free_memory() + local * rss_bytes("RssAnon"),
        disk_bytes=shutil.disk_usage(disk).free if disk else 0,
        nodes=max(1, ranks // local),
    )
