"""What fits where: bytes on each GPU, host and disk in every hosting of the teacher, before anything is allocated.

  python tools/plan.py                                                     the paper's pair, on this machine
  python tools/plan.py --gpus 8 --gpu-mem 24 --host-mem 256 --nvme 500     on another one
  python tools/plan.py --gpus 1 --gpu-mem 24 --host-mem 64 --micro-batch-size 1 --activation-checkpointing

Every knob of training may be given as the trainer takes it; those that cost memory count. Hostings that fit come
first, the one expected fastest at the top. The trainer makes the same check before it starts. Exit status 1: nothing
fits.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_tide import cli
from megatron_tide.config import DistillConfig, add_flags, from_flat
from megatron_tide.files import write_json
from megatron_tide.hosting.plan.check import asked_of, job_of, local_machine, model_config, nvme_folder
from megatron_tide.hosting.plan.fit import Plan, closest, plans, with_changes
from megatron_tide.hosting.plan.job import Job
from megatron_tide.hosting.plan.ledger import Peak
from megatron_tide.hosting.plan.machine import GB, GIB, Machine
from megatron_tide.hosting.plan.speed import Rates, rate_names
from megatron_tide.models.families import read_config

SHAPES = Path(__file__).resolve().parents[1] / "megatron_tide" / "models" / "configs"
EXIT_NOTHING_FITS = 1


def main(argv: list[str]) -> int:
    parser, own_names = _parser()
    knobs = vars(parser.parse_args(argv))
    own = argparse.Namespace(**{name: knobs.pop(name) for name in own_names})
    models = {"student": str(SHAPES / "qwen3_0.6b.json"), "teacher": str(SHAPES / "llada2_mini.json")}
    config = from_flat({**models, **knobs}, "command line")
    machine, rates = _machine(own, config), Rates(**{name: getattr(own, name) for name, *_ in rate_names()})
    job = _job(own, config, machine)
    found = plans(job, machine, rates)
    print("\n".join([*_head(job, machine), "", *_table(found), "", *_verdict(found, job, machine, rates)]))
    if own.json:
        write_json(own.json, {"machine": asdict(machine), "plans": [_as_dict(item) for item in found]})
    return 0 if found[0].fits else EXIT_NOTHING_FITS


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of this tool's own flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    node = parser.add_argument_group("machine", "what is not given is looked up on this machine")
    node.add_argument("--gpus", type=int, help="GPUs of a node; 0: none, one rank computes on the host")
    node.add_argument("--gpu-mem", type=float, metavar="GIB", help="memory of each GPU, in GiB, as it is sold")
    node.add_argument("--host-mem", type=float, metavar="GIB", help="memory of a node, in GiB")
    node.add_argument("--nvme", type=float, metavar="GB", help="free space on a node's fast disk, in GB")
    node.add_argument("--nodes", type=int, default=1, help="equal nodes (default: %(default)s)")
    node.add_argument("--student-length", type=int, default=512, metavar="TOKENS", help="default: %(default)s")
    node.add_argument("--teacher-length", type=int, default=1024, metavar="TOKENS", help="default: %(default)s")
    node.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")
    speed = parser.add_argument_group("rates", "what the estimate of speed assumes")
    for name, default, meaning in rate_names():
        flag = f"--{name.replace('_', '-')}"
        speed.add_argument(flag, type=float, default=default, metavar="RATE", help=f"{meaning} (default: %(default)s)")
    own = [action.dest for action in parser._actions if action.dest != "help"]
    add_flags(parser)
    return parser, own


def _machine(own: argparse.Namespace, config: DistillConfig) -> Machine:
    """This machine, or the one that the flags describe; of another machine's disk nothing is known but --nvme."""
    here = local_machine(own.gpus or torch.cuda.device_count() or 1, nvme_folder({}, config.teacher.teacher_nvme))
    if own.gpus and not (own.gpu_mem or here.has_gpus):
        raise ValueError("--gpus without --gpu-mem: this machine has no GPU to look at; give the memory of one, in GiB")
    if own.gpu_mem and not (own.gpus or here.has_gpus):
        raise ValueError("--gpu-mem without --gpus: this machine has no GPU to count; say how many a node has")
    other = any(value is not None for value in (own.gpus, own.gpu_mem, own.host_mem))
    disk = 0 if other else here.disk_bytes
    return Machine(
        ranks=max(1, own.gpus) if own.gpus is not None else here.ranks,
        gpu_bytes=0 if own.gpus == 0 else int(own.gpu_mem * GIB) if own.gpu_mem else here.gpu_bytes,
        host_bytes=int(own.host_mem * GIB) if own.host_mem else here.host_bytes,
        disk_bytes=disk if own.nvme is None else int(own.nvme * GB),
        nodes=own.nodes,
    )


def _job(own: argparse.Namespace, config: DistillConfig, machine: Machine) -> Job:
    sizes = [read_config(model_config(path))[1].vocab_size for path in (config.paths.student, config.paths.teacher)]
    asked = asked_of(config.strategy, sizes[0] == sizes[1], own.student_length, own.teacher_length)
    return job_of(config, machine.world, asked)


def _head(job: Job, machine: Machine) -> list[str]:
    precision = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    lines = [
        f"machine  {machine.describe()}",
        f"student  {job.student.parameters / 1e9:.3f} B, {precision[job.precision]}, "
        f"ZeRO {job.deepspeed['zero_optimization']['stage']}"
        f"{', recomputed layers' if job.recompute else ''}; {job.student_length} positions a sample",
    ]
    if job.teacher:
        lines.append(
            f"teacher  {job.teacher.parameters / 1e9:.3f} B, {precision[job.teacher_dtype]}; {job.teacher_length} "
            f"positions a sample{', twice (CompDemo)' if job.halves == 2 else ''}"
        )
    batch = job.micro_batch_size * job.accumulation * job.ranks
    step = f"{batch} samples: {job.ranks} rank(s) x {job.accumulation} micro-batches of {job.micro_batch_size}"
    return [*lines, f"step     {step}"]


def _table(found: list[Plan]) -> list[str]:
    columns = ("hosting", "each GPU, GiB", "host, GiB", "disk, GB", "teacher, s/step", "")
    rows = [columns, *(_row(item) for item in found)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(item: Plan) -> tuple[str, ...]:
    machine = item.machine
    gpu = f"{item.gpu.bytes / GIB:.1f} of {machine.gpu_bytes / GIB:.0f}" if item.gpu else "-"
    host = f"{item.host.bytes / GIB:.1f} of {machine.host_bytes / GIB:.0f}"
    lacks = ", ".join(f"{place} lacks {_amount(place, size)}" for place, size in item.lacks.items())
    disk = f"{sum(item.disk.values()) / GB:.1f}"
    return item.hosting.name, gpu, host, disk, f"{item.seconds:.2f}", f"no: {lacks}" if lacks else "fits"


def _amount(place: str, size: int) -> str:
    return f"{size / GB:.1f} GB" if place == "disk" else f"{size / GIB:.1f} GiB"


def _verdict(found: list[Plan], job: Job, machine: Machine, rates: Rates) -> list[str]:
    """What to set, and what the best plan consists of; or what is lacking and what would fix it."""
    lines: list[str] = []
    changes: tuple[str, ...] = ()
    if not found[0].fits:
        near = closest(found)
        lines.append(f"nothing fits as it is; closest is {near.hosting.name}: {near.complaint()}")
        changes, found = with_changes(job, machine, rates)
    if not found[0].fits:
        near = closest(found)
        mends = f" with {' '.join(changes)}" if changes else ""
        return [*lines, f"nothing fits{mends}: {near.hosting.name} still lacks most: {near.complaint()}", *_parts(near)]
    best = found[0]
    flags = " ".join([*changes, *([best.hosting.flags] if job.teacher else [])])
    nvme = " --teacher-nvme FOLDER" if "teacher weights" in best.disk else ""
    lines.append(f"set: {flags or 'nothing, the defaults fit'}{nvme}")
    if job.teacher:
        knob = f"HOSTING={best.hosting.name}{' TEACHER_NVME=FOLDER' if nvme else ''}"
        lines.append(f"     (recipes: {' '.join([knob, *changes])}; expected fastest of what fits)")
    return [*lines, *_parts(best)]


def _parts(item: Plan) -> list[str]:
    lines = []
    for place, peak in (("each GPU", item.gpu), ("host", item.host)):
        if peak is None:
            continue
        lines += ["", f"{item.hosting.name}, {place} at its fullest ({peak.phase}), GiB:"]
        parts = sorted(peak.parts.items(), key=lambda part: -part[1])
        lines += [f"  {size / GIB:8.2f}  {part}" for part, size in parts]
    lines += ["", f"{item.hosting.name}, disk, GB:"]
    return [*lines, *(f"  {size / GB:8.2f}  {part}" for part, size in item.disk.items())]


def _as_dict(item: Plan) -> dict[str, Any]:
    def place(peak: Peak | None) -> dict[str, Any] | None:
        return None if peak is None else {"bytes": peak.bytes, "phase": peak.phase, "parts": peak.parts}

    return {
        "hosting": item.hosting.name,
        "flags": item.hosting.flags,
        "fits": item.fits,
        "lacks": item.lacks,
        "gpu": place(item.gpu),
        "host": place(item.host),
        "host_peak_rss": place(item.host_resident),
        "disk": item.disk,
        "expected_teacher_seconds": item.seconds,
    }


if __name__ == "__main__":
    cli.run(main)
