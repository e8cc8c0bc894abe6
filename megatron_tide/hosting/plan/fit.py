"""What fits: bytes on each GPU, host and disk, for a run in each hosting, before anything is allocated.

``tools/plan.py`` prints it for any machine; the trainer asks :func:`check_plan` about the one it runs on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tide.ds_config import REPOSITORY, read_ds_config
from megatron_tide.hosting.plan import teacher
from megatron_tide.hosting.plan.books import Books
from megatron_tide.hosting.plan.job import Job
from megatron_tide.hosting.plan.kernels import kernel_bytes
from megatron_tide.hosting.plan.ledger import Peak
from megatron_tide.hosting.plan.machine import GB, GIB, Machine
from megatron_tide.hosting.plan.speed import USUAL, Rates, teacher_seconds
from megatron_tide.hosting.plan.student import add_student

# A process that has imported torch, DeepSpeed and transformers, joined a group, built an engine, opened TensorBoard and
# taken a step, less all tensors: measured in fp32 on CPU, 0.35 GB of its own and 0.12 GB of mapped libraries.
PROCESS = 0.47e9
# The same with the CUDA build, and on its GPU: context, NCCL, cuBLAS workspaces. Usual figures, not measured here.
CUDA_PROCESS, CUDA_CONTEXT = 3.0e9, 1.2e9

NO_TEACHER = "no teacher"


@dataclass(frozen=True)
class Hosting:
    """Where a teacher may live: a name, the DeepSpeed JSON (``file``, "" for resident) and what it says."""

    name: str
    kind: str
    file: str
    settings: dict[str, Any]

    @property
    def flags(self) -> str:
        return f"--teacher-hosting {self.kind}" + (f" --teacher-deepspeed {self.file}" if self.file else "")


@dataclass(frozen=True)
class Plan:
    """A hosting on a machine: the fullest phase of each place, and the teacher's expected seconds a step.

    ``gpu``: of each (None where there is none); ``host``: of a node; ``disk``: bytes by part, of a node.
    ``host_resident``: as ``host``, with the pages of files that a process maps while it loads: what is measured as
    its peak, though they are given up when memory is short.
    """

    hosting: Hosting
    machine: Machine
    gpu: Peak | None
    host: Peak
    host_resident: Peak
    disk: dict[str, int]
    seconds: float

    @property
    def lacks(self) -> dict[str, int]:
        """Bytes by which each place is too small."""
        needs = {"host memory": (self.host.bytes, self.machine.host_bytes)}
        if self.gpu is not None:
            needs["each GPU"] = (self.gpu.bytes, self.machine.gpu_bytes)
        if "teacher weights" in self.disk:
            needs["disk"] = (self.disk["teacher weights"], self.machine.disk_bytes)
        return {place: need - has for place, (need, has) in needs.items() if need > has}

    @property
    def fits(self) -> bool:
        return not self.lacks

    def complaint(self) -> str:
        """What is too large, and by how much: one line."""
        return " and ".join(self._complaints())

    def _complaints(self) -> Iterator[str]:
        peaks = {"each GPU": self.gpu, "host memory": self.host}
        for place, lack in self.lacks.items():
            peak = peaks.get(place)
            if peak is None:
                disk = self.machine.disk_bytes / GB
                yield f"disk: needs {(lack / GB + disk):.1f} GB free for the teacher and has {disk:.1f}"
                continue
            part, size = max(peak.parts.items(), key=lambda item: item[1])
            has = (peak.bytes - lack) / GIB
            yield (
                f"{place}: needs {peak.bytes / GIB:.1f} GiB and has {has:.1f}, {lack / GIB:.1f} too little "
                f"(in the {peak.phase}; most of it {part}, {size / GIB:.1f})"
            )


def every_hosting() -> list[Hosting]:
    """Resident, and each file ds_configs/teacher_*.json; the file's name begins with the kind."""
    files = sorted((REPOSITORY / "ds_configs").glob("teacher_*.json"))
    return [Hosting("replicated", "replicated", "", {}), *(_hosting(path) for path in files)]


def _hosting(path: Path) -> Hosting:
    name = path.stem.removeprefix("teacher_")
    file = f"{path.parent.name}/{path.name}"
    return Hosting(name, name.partition("_")[0], file, read_ds_config(str(path), "--teacher-deepspeed"))


_ENTER: dict[str, Callable[..., None]] = {
    "replicated": teacher.add_resident,
    "zero3": teacher.add_zero3,
    "pipeline": teacher.add_pipeline,
}


def plan(job: Job, machine: Machine, hosting: Hosting, rates: Rates = USUAL) -> Plan:
    """One hosting on one machine. ValueError for more pipeline stages than the teacher has parts."""
    books = Books(machine)
    books.hold("framework", CUDA_PROCESS if machine.has_gpus else PROCESS, host=True)
    if machine.has_gpus:
        books.hold("framework", CUDA_CONTEXT)
    else:
        books.hold("compiled kernels", kernel_bytes(job))
    add_student(books, job)
    seconds = 0.0
    if job.teacher is not None:
        _ENTER[hosting.kind](books, job, job.teacher, hosting.settings)
        seconds = teacher_seconds(job, job.teacher, machine, hosting.settings, rates)
    return Plan(
        hosting=hosting,
        machine=machine,
        gpu=books.gpu.peak(pages=False) if machine.has_gpus else None,
        host=books.host.peak(pages=False),
        host_resident=books.host.peak(pages=True),
        disk=books.disk,
        seconds=seconds,
    )


def plans(job: Job, machine: Machine, rates: Rates = USUAL) -> list[Plan]:
    """Every hosting that this many ranks can have: those that fit first, the fastest first."""
    if job.teacher is None:
        return [plan(job, machine, Hosting(NO_TEACHER, NO_TEACHER, "", {}), rates)]
    parts = len(job.teacher.layers) + 2
    able = []
    for hosting in every_hosting():
        stages = hosting.settings.get("pipeline", {}).get("stages", 1)
        if job.ranks % stages == 0 and stages <= parts:
            able.append(plan(job, machine, hosting, rates))
    return sorted(able, key=lambda found: (not found.fits, found.seconds))


def closest(found: Sequence[Plan]) -> Plan:
    """Of plans that do not fit, the one whose worst place lacks the smallest share of what it needs."""

    def worst(item: Plan) -> float:
        needs = {"each GPU": item.gpu, "host memory": item.host}
        needed = {place: peak.bytes for place, peak in needs.items() if peak} | {"disk": sum(item.disk.values())}
        return max(lack / needed[place] for place, lack in item.lacks.items())

    return min(found, key=worst)


# What can be given up for memory, the cheapest first; none of it changes the curve.
CHANGES: dict[str, Callable[[Job], Job]] = {
    "--activation-checkpointing": lambda job: replace(job, recompute=True),
    "--micro-batch-size 1": lambda job: replace(
        job, micro_batch_size=1, accumulation=job.accumulation * job.micro_batch_size
    ),
    "--deepspeed ds_configs/zero2_offload.json": lambda job: replace(
        job, deepspeed=read_ds_config("ds_configs/zero2_offload.json", "--deepspeed")
    ),
}


def with_changes(job: Job, machine: Machine, rates: Rates = USUAL) -> tuple[tuple[str, ...], list[Plan]]:
    """The fewest changes with which something fits; without any, all of them; and the plans after them."""
    able = [name for name, change in CHANGES.items() if change(job) != job]
    names: tuple[str, ...] = ()
    found = plans(job, machine, rates)
    for count in range(1, len(able) + 1):
        for names in itertools.combinations(able, count):
            changed = job
            for name in names:
                changed = CHANGES[name](changed)
            found = plans(changed, machine, rates)
            if found[0].fits:
                return names, found
    return names, found


def advice(job: Job, machine: Machine, others: Sequence[Plan]) -> str:
    """What would fit, as flags: of ``others``, or after changes; else what lacks least."""
    names: tuple[str, ...] = ()
    if not others[0].fits:
        names, others = with_changes(job, machine)
    if others[0].fits:
        return f"this would fit: {' '.join([*names, *_hosting_flags(job, others[0])])}"
    near = closest(others)
    with_all = f" with {' '.join(names)}" if names else ""
    return f"nothing would fit here; closest is {near.hosting.name}{with_all}: {near.complaint()}"


def _hosting_flags(job: Job, found: Plan) -> list[str]:
    return [found.hosting.flags] if job.teacher else []
