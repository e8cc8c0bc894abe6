"""How long the teacher's part of an optimizer step should take: an estimate, to order hostings by.

Per step and rank, a hosting computes 2 x active parameters x positions (and attention), and moves bytes. Both go on at
the same time, so the longer one counts; a pipeline waits (stages - 1) / (micro-batches + stages - 1) of its time. The
rates are assumptions until they are measured on the machine: give your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from megatron_tide.ds_config import offload_of
from megatron_tide.hosting.plan.job import Job, Model
from megatron_tide.hosting.plan.machine import GB, Machine
from megatron_tide.hosting.plan.teacher import heaviest_stage, teacher_units


def _rate(default: float, meaning: str) -> Any:
    return field(default=default, metadata={"help": meaning})


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine reaches; TFLOP/s and GB/s."""

    gpu_tflops: float = _rate(150.0, "TFLOP/s of a GPU in the teacher's matmuls")
    cpu_tflops: float = _rate(0.5, "TFLOP/s of a rank without GPU in the teacher's matmuls")
    gather_gbs: float = _rate(20.0, "GB/s that a rank receives when ranks gather a unit (PCIe; NVLink gives 10 times)")
    pcie_gbs: float = _rate(20.0, "GB/s from host memory to a GPU")
    disk_gbs: float = _rate(3.0, "GB/s that a node reads from its disk")
    hop_gbs: float = _rate(10.0, "GB/s between neighbours of a pipeline")


USUAL = Rates()


def rate_names() -> list[tuple[str, float, str]]:
    """(name, default, meaning) of each rate."""
    return [(item.name, getattr(USUAL, item.name), item.metadata["help"]) for item in fields(Rates)]


def teacher_seconds(job: Job, teacher: Model, machine: Machine, settings: dict[str, Any], rates: Rates) -> float:
    """Expected seconds a step; ``settings``: the hosting's DeepSpeed JSON, {} for a resident one."""
    positions = job.accumulation * job.teacher_positions
    attention = 4.0 * sum(layer.query for layer in teacher.layers) * job.teacher_length
    head = (
        2.0 * teacher.vocab * teacher.hidden * job.accumulation * job.micro_batch_size * job.teacher_tokens * job.gold
    )
    work = positions * (2.0 * teacher.active + attention) + head
    compute = work / (1e12 * (rates.gpu_tflops if machine.has_gpus else rates.cpu_tflops))
    if "pipeline" in settings:
        return _piped(job, teacher, settings["pipeline"]["stages"], compute, rates)
    if not settings:
        return compute
    device = offload_of(settings).get("device", "none")
    held = sum(unit.flat_bytes for unit in teacher_units(job, teacher))
    gather = held * (job.ranks - 1) / job.ranks / (GB * rates.gather_gbs)
    upload = held / job.ranks / (GB * rates.pcie_gbs) if machine.has_gpus and device != "none" else 0.0
    if device == "nvme":  # a unit is read while the one before is gathered and computed
        return max(held / machine.nodes / (GB * rates.disk_gbs), upload + gather + compute)
    return max(compute, gather, upload)


def _piped(job: Job, teacher: Model, stages: int, compute: float, rates: Rates) -> float:
    """All members' micro-batches flow through, so a rank computes its own share of as many as it has; it waits for the
    heaviest stage, and at both ends of the sweep."""
    whole = sum(unit.flat_bytes for unit in teacher_units(job, teacher))
    uneven = heaviest_stage(job, teacher, stages) * stages / whole
    count = job.accumulation * stages
    hops = count * job.teacher_positions * teacher.hidden * job.teacher_dtype.itemsize / (GB * rates.hop_gbs)
    return max(compute * uneven, hops) * (count + stages - 1) / count
