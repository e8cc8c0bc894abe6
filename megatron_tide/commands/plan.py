"""Predict which teacher hostings fit a machine: memory of each GPU, of the host and of the disk.

Nothing is allocated. Accepts all flags of training; those that change memory matter. Hostings that fit come first,
the fastest (estimated) at the top. The trainer makes the same check before it starts. Exit status 1: nothing fits.

Examples:
  python -m megatron_tide plan                                                   the paper's pair, on this machine
  python -m megatron_tide plan --gpus 8 --gpu-mem 24 --host-mem 256 --nvme 500   on another one
  python -m megatron_tide plan --gpus 1 --gpu-mem 24 --host-mem 64 --micro-batch-size 1 --activation-checkpointing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tide.cli import flag, say
from megatron_tide.commands import STUDENT_LENGTH, TEACHER_LENGTH
from megatron_tide.config import DistillConfig
from megatron_tide.fast import GIB
from megatron_tide.files import write_json
from megatron_tide.hosting.speed import Rates

if TYPE_CHECKING:
    from megatron_tide.hosting.memory import Machine, RunShape
    from megatron_tide.hosting.plan import ClusterTime, Plan

SHAPES = Path(__file__).resolve().parents[1] / "models" / "configs"
EXIT_NOTHING_FITS = 1
GB = 10**9  # disks are sold in it, memory in GiB
USABLE = 0.98  # of a GPU's stated memory: the driver keeps the rest (79.1 GiB are left of 80, 23.6 of 24)


@dataclass(frozen=True, kw_only=True)
class MachineArgs:
    """Machine (values not set are read from this machine)."""

    gpus: int | None = flag(None, "Number of GPUs per node; 0: none, one rank computes on the CPU", low=0)
    gpu_mem: float | None = flag(None, "Memory of each GPU, in GiB", metavar="GIB", low=0)
    host_mem: float | None = flag(None, "Host memory per node, in GiB", metavar="GIB", low=0)
    nvme: float | None = flag(None, "Free space on the node's fast disk, in GB", metavar="GB", low=0)
    nodes: int = flag(1, "Number of equal nodes", low=1)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Arguments of the plan command."""

    student_length: int = flag(
        STUDENT_LENGTH, "Length of the longest sample, in the student's tokens", metavar="TOKENS", low=1
    )
    teacher_length: int = flag(
        TEACHER_LENGTH, "Length of the longest sample, in the teacher's tokens", metavar="TOKENS", low=1
    )
    tokens: float = flag(
        1.0, "Length of the run in billions of student tokens, to estimate its hours", metavar="BILLIONS", low=0
    )
    json: Path | None = flag(
        None, "Also write all numbers to FILE, as JSON", metavar="FILE", writes="file", keys=("plans",)
    )
    machine: MachineArgs = field(default_factory=MachineArgs)
    rates: Rates = field(default_factory=Rates)
    config: DistillConfig = field(default_factory=DistillConfig)


def defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The paper's pair, and the rates of the card that was measured, if one was."""
    from megatron_tide.hosting.speed import measured_rates

    return {"student": str(SHAPES / "qwen3_0.6b.json"), "teacher": str(SHAPES / "llada2_mini.json"), **measured_rates()}


def run(args: Args) -> int:
    from megatron_tide.hosting.plan import cluster_times, model_config, plans, run_shape, teacher_needs
    from megatron_tide.models.families import read_config

    machine, paths = _machine(args.machine, args.config), args.config.paths
    sizes = {read_config(model_config(path))[1].vocab_size for path in (paths.student, paths.teacher)}
    needs = teacher_needs(args.config.strategy, len(sizes) == 1, args.student_length, args.teacher_length)
    shape = run_shape(args.config, machine.world, needs)
    found = plans(shape, machine, args.rates)
    say("\n".join([*_head(shape, machine), "", *_table(found), "", *_verdict(shape, machine, args.rates, found)]))
    times = cluster_times(shape, machine, args.rates) if machine.has_gpus else []
    if times:
        say("\n".join(["", *_hours(times, shape, args)]))
    if args.json:
        more = [{"hosting": item.hosting.name, "fits": item.fits, "lacks": item.lacks} for item in found]
        content: dict[str, Any] = {"plans": [asdict(item) | extra for item, extra in zip(found, more)]}
        write_json(args.json, content | {"clusters": [asdict(item) for item in times]})
    return 0 if found[0].fits else EXIT_NOTHING_FITS


def _machine(given: MachineArgs, config: DistillConfig) -> Machine:
    """This machine, or the one that the flags describe; of another machine's disk only --nvme is known."""
    import torch

    from megatron_tide.hosting.memory import Machine
    from megatron_tide.hosting.plan import local_machine, nvme_folder

    here = local_machine(given.gpus or torch.cuda.device_count() or 1, nvme_folder({}, config.teacher.teacher_nvme))
    if given.gpus and not (given.gpu_mem or here.has_gpus):
        raise ValueError(
            "--gpus without --gpu-mem: this machine has no GPU to read it from; set the memory of one GPU, in GiB"
        )
    if given.gpu_mem and not (given.gpus or here.has_gpus):
        raise ValueError("--gpu-mem without --gpus: this machine has no GPU to count; set the number per node")
    other = (given.gpus, given.gpu_mem, given.host_mem) != (None, None, None)
    disk = 0 if other else here.disk_bytes
    return Machine(
        ranks=here.ranks if given.gpus is None else max(1, given.gpus),
        gpu_bytes=0 if given.gpus == 0 else int(USABLE * given.gpu_mem * GIB) if given.gpu_mem else here.gpu_bytes,
        host_bytes=int(given.host_mem * GIB) if given.host_mem else here.host_bytes,
        disk_bytes=disk if given.nvme is None else int(given.nvme * GB),
        nodes=given.nodes,
    )


def _head(shape: RunShape, machine: Machine) -> list[str]:
    train, teacher = shape.config.train, shape.teacher
    gpus = f"{machine.ranks} GPU(s) of {machine.gpu_bytes / GIB:.0f} GiB"
    what = gpus if machine.has_gpus else f"no GPU, {machine.ranks} rank(s)"
    disk = f", {machine.disk_bytes / GB:.0f} GB free on disk" if machine.disk_bytes else ""
    nodes = "" if machine.nodes == 1 else f"{machine.nodes} nodes of "
    micro = f"{shape.ranks} rank(s) x {shape.accumulation} micro-batches of {train.micro_batch_size}"
    lines = [
        f"machine  {nodes}{what}, {machine.host_bytes / GIB:.0f} GiB of host memory{disk}",
        f"student  {shape.student.parameters / 1e9:.3f} B, {train.precision}, ZeRO {shape.deepspeed['stage']}"
        f"{', recomputed layers' if train.activation_checkpointing else ''}; {shape.student_length} positions "
        "per sample",
    ]
    if teacher:
        lines.append(
            f"teacher  {teacher.parameters / 1e9:.3f} B, {shape.config.teacher.teacher_dtype}; {shape.teacher_length} "
            f"positions per sample{', twice (CompDemo)' if shape.needs.compdemo else ''}"
        )
    return [*lines, f"step     {train.global_batch_size} samples: {micro}"]


def _table(found: list[Plan]) -> list[str]:
    rows = [("hosting", "each GPU, GiB", "host, GiB", "disk, GB", "teacher, s/step", "")]
    for item in found:
        gpu = f"{item.gpu.bytes / GIB:.1f} of {item.machine.gpu_bytes / GIB:.0f}" if item.gpu else "-"
        host = f"{item.host.bytes / GIB:.1f} of {item.machine.host_bytes / GIB:.0f}"
        lacks = ", ".join(f"{place} needs {size / GIB:.1f} GiB more" for place, size in item.lacks.items())
        disk = f"{sum(item.disk.values()) / GB:.1f}"
        rows.append((item.hosting.name, gpu, host, disk, f"{item.seconds:.2f}", f"no: {lacks}" if lacks else "fits"))
    return _aligned(rows)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _hours(times: Sequence[ClusterTime], shape: RunShape, args: Args) -> list[str]:
    """How long a run takes on several numbers of such GPUs."""
    rows: list[tuple[str, ...]] = [
        ("GPUs", "links", "hosting", "s/step", "teacher", "student", "update", "network", "tokens/s", "hours")
    ]
    for item in times:
        step, hours = item.step, args.tokens * 1e9 / item.tokens_per_second / 3600
        parts = (f"{part:.2f}" for part in (step.total, step.teacher, step.student, step.update, step.network))
        links, hosting = item.links or "-", item.hosting or "none fits"
        rows.append((str(item.gpus), links, hosting, *parts, f"{item.tokens_per_second:,.0f}", f"{hours:,.1f}"))
    batch, longest = shape.config.train.global_batch_size, shape.needs.student_tokens
    title = f"a run of {args.tokens:g} billion student tokens, {batch} samples of {longest} per step, estimated at"
    return [f"{title} {args.rates.gpu_tflops:.0f} TFLOP/s of each GPU:", *_aligned(rows)]


def _verdict(shape: RunShape, machine: Machine, rates: Rates, found: list[Plan]) -> list[str]:
    """The flags to set and the parts of the best plan; or what is too small, and what would help."""
    from megatron_tide.hosting.plan import closest, with_savings

    lines: list[str] = []
    if not found[0].fits:
        near = closest(found)
        lines.append(f"nothing fits with these flags; closest is {near.hosting.name}: {near.complaint()}")
    savings, found = with_savings(shape, machine, rates)
    best = found[0]
    if not best.fits:
        near, after = closest(found), f" with {' '.join(savings)}" if savings else ""
        return [*lines, f"nothing fits{after}: closest is {near.hosting.name}: {near.complaint()}", *_parts(near)]
    flags = " ".join([*savings, *([best.hosting.flags] if shape.teacher else [])])
    nvme = "teacher weights" in best.disk
    lines.append(f"set: {flags or 'nothing, the defaults fit'}{' --teacher-nvme FOLDER' if nvme else ''}")
    if shape.teacher:
        hosting = f"HOSTING={best.hosting.name}{' TEACHER_NVME=FOLDER' if nvme else ''}"
        lines.append(f"     (recipes: {' '.join([hosting, *savings])}; expected to be the fastest that fits)")
    return [*lines, *_parts(best)]


def _parts(item: Plan) -> list[str]:
    lines = []
    for place, peak in (("each GPU", item.gpu), ("host", item.host)):
        if peak:
            lines += ["", f"{item.hosting.name}, {place} at its peak ({peak.phase}), GiB:"]
            parts = sorted(peak.parts.items(), key=lambda part: -part[1])
            lines += [f"  {size / GIB:8.2f}  {part}" for part, size in parts]
    lines += ["", f"{item.hosting.name}, disk, GB:"]
    return [*lines, *(f"  {size / GB:8.2f}  {part}" for part, size in item.disk.items())]
