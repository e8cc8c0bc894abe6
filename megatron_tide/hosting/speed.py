"""Estimated time of the teacher per optimizer step, to rank hostings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_tide.cli import flag
from megatron_tide.ds_config import offload_of

if TYPE_CHECKING:
    from megatron_tide.hosting.memory import Machine, ModelShape, RunShape

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Hardware rates assumed in the speed estimate."""

    gpu_tflops: float = flag(150.0, "TFLOP/s of a GPU in the teacher's matmuls", low=1e-6)
    cpu_tflops: float = flag(0.5, "TFLOP/s of a rank without GPU in the teacher's matmuls", low=1e-6)
    gather_gbs: float = flag(
        20.0, "GB/s that a rank receives when layers are gathered (default for PCIe; NVLink: 10 times more)", low=1e-6
    )
    pcie_gbs: float = flag(20.0, "GB/s from host memory to a GPU", low=1e-6)
    disk_gbs: float = flag(3.0, "GB/s that a node reads from its disk", low=1e-6)
    hop_gbs: float = flag(10.0, "GB/s between neighbours of a pipeline", low=1e-6)


RATES = Rates()


def teacher_seconds(
    run: RunShape, teacher: ModelShape, machine: Machine, settings: dict[str, Any], rates: Rates
) -> float:
    """Expected seconds of the teacher per optimizer step; ``settings``: its DeepSpeed JSON, {} for a replicated one.

    Computing (2 x active parameters x positions, attention, head) and moving bytes overlap, so the longer one counts.
    A pipeline computes at the pace of its heaviest stage and fills and drains: micro-batches + stages - 1 turns.
    """
    config, positions = teacher.config, run.accumulation * run.teacher_positions
    attention = 4.0 * len(teacher.widths) * config.num_attention_heads * config.head_dim * run.teacher_length
    rows = run.accumulation * run.config.train.micro_batch_size * run.needs.teacher_tokens * run.needs.target_logprobs
    work = positions * (2.0 * teacher.active_parameters + attention) + 2.0 * rows * teacher.vocab * teacher.hidden
    compute = work / (TERA * (rates.gpu_tflops if machine.has_gpus else rates.cpu_tflops))
    if not settings:
        return compute
    layers = sum(run.layer_bytes())
    if "pipeline" in settings:
        stages = settings["pipeline"]["stages"]
        count = run.accumulation * stages  # every stage sees the micro-batches of all its pipeline's ranks
        hops = stages * positions * teacher.hidden * run.teacher_dtype.itemsize / (GIGA * rates.hop_gbs)
        return max(compute * max(run.layer_bytes(stages)) * stages / layers, hops) * (count + stages - 1) / count
    device = offload_of(settings).get("device", "none")
    gather = layers * (run.ranks - 1) / run.ranks / (GIGA * rates.gather_gbs)
    upload = layers / run.ranks / (GIGA * rates.pcie_gbs) if machine.has_gpus and device != "none" else 0.0
    if device == "nvme":  # a layer is read while the one before is gathered and computed
        return max(layers / machine.nodes / (GIGA * rates.disk_gbs), upload + gather + compute)
    return max(compute, gather, upload)
