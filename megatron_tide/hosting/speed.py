"""Estimated time of an optimizer step: the teacher's, to rank hostings; and the whole step's, to plan a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tide.cli import flag
from megatron_tide.ds_config import offload_of
from megatron_tide.files import read_json

if TYPE_CHECKING:
    from megatron_tide.hosting.memory import Machine, ModelShape, RunShape

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Hardware rates assumed in the speed estimate."""

    gpu_tflops: float = flag(150.0, "TFLOP/s of a GPU in training, idle time included", low=1e-6)
    cpu_tflops: float = flag(0.5, "TFLOP/s of a rank without GPU in the teacher's matmuls", low=1e-6)
    memory_gbs: float = flag(1500.0, "GB/s of a GPU's own memory", low=1e-6)
    gather_gbs: float = flag(20.0, "GB/s per rank when layers are gathered: PCIe's, NVLink has 10 times more", low=1e-6)
    pcie_gbs: float = flag(20.0, "GB/s from host memory to a GPU", low=1e-6)
    disk_gbs: float = flag(3.0, "GB/s that a node reads from its disk", low=1e-6)
    hop_gbs: float = flag(10.0, "GB/s between neighbours of a pipeline", low=1e-6)
    nvlink_gbs: float = flag(200.0, "GB/s between GPUs over NVLink", low=1e-6)
    node_gbs: float = flag(10.0, "GB/s between nodes; the default is 100 Gb Ethernet's", low=1e-6)


RATES = Rates()
UPDATE_BYTES = 30  # per parameter: gradient, weight and moments read, weight and moments written, bf16 weight written
REDUCED_BYTES = 10  # per parameter: gradients in fp32, there and back, and updated weights in bf16
_RATE = (None, float)
_MEASURED = {
    "stages": {
        "a?": {"memory_gbs?": _RATE, "pinned_to_card_gbs?": _RATE, "bf16_tflops?": float},
        "h?": {str: (Any, {"tflops?": float})},
        str: dict,
    }
}
MEASURED = Path(__file__).parents[2] / "benchmarks/results/gpu.json"


def measured_rates(file: Path = MEASURED) -> dict[str, float]:
    """What ``benchmarks/gpu.py`` has measured, by the names of :class:`Rates`; {} if there is no file.

    TFLOP/s are those of a whole step where it was measured, else 0.4 of a matmul's.
    """
    if not file.is_file():
        return {}
    stages = read_json(file, "measure again, or remove it", _MEASURED)["stages"]
    card, full_size = stages.get("a", {}), stages.get("h", {})
    parts = [part for name, part in full_size.items() if name.startswith("tide-") and isinstance(part, dict)]
    steps = [part["tflops"] for part in parts if "tflops" in part]
    found = {"memory_gbs": card.get("memory_gbs"), "pcie_gbs": card.get("pinned_to_card_gbs")}
    found["gpu_tflops"] = max(steps, default=0.0) or 0.4 * card.get("bf16_tflops", 0.0) or None
    return {name: float(rate) for name, rate in found.items() if rate}


@dataclass(frozen=True)
class StepTime:
    """Expected seconds of the parts of an optimizer step, one after the other."""

    teacher: float
    student: float
    update: float
    network: float

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.update + self.network


def step_time(run: RunShape, teacher: float, rates: Rates, link_gbs: float) -> StepTime:
    """A step on GPUs; ``teacher``: its seconds (:func:`teacher_seconds`); ``link_gbs``: the slowest link of a ring.

    The student's backward pass costs twice its forward pass, and recomputed layers one more. Half of the tokens are
    masked on average, and scored. Gradients are reduced after the backward pass.
    """
    student, train = run.student, run.config.train
    samples = run.accumulation * train.micro_batch_size
    layers = samples * run.student_length * _position_flops(student, run.student_length)
    head = samples * run.needs.student_tokens / 2 * 2.0 * student.vocab * student.hidden
    work = (4 if train.activation_checkpointing else 3) * layers + 3 * head
    share, offloads = student.parameters / run.ranks, "offload_optimizer" in run.deepspeed
    update = UPDATE_BYTES * share / (GIGA * (rates.pcie_gbs if offloads else rates.memory_gbs))
    network = REDUCED_BYTES * student.parameters * (run.ranks - 1) / run.ranks / (GIGA * link_gbs)
    return StepTime(teacher, work / (TERA * rates.gpu_tflops), update, network)


def _position_flops(model: ModelShape, length: int) -> float:
    """Of the layers in a forward pass, per position: matmuls, and attention to ``length`` positions."""
    config = model.config
    return (
        2.0 * model.active_parameters + 4.0 * len(model.widths) * config.num_attention_heads * config.head_dim * length
    )


def teacher_seconds(
    run: RunShape, teacher: ModelShape, machine: Machine, settings: dict[str, Any], rates: Rates
) -> float:
    """Expected seconds of the teacher per optimizer step; ``settings``: its DeepSpeed JSON, {} for a replicated one.

    Computing (2 x active parameters x positions, attention, head) and moving bytes overlap, so the longer one counts.
    A pipeline computes at the pace of its heaviest stage and fills and drains: micro-batches + stages - 1 turns.
    """
    positions = run.accumulation * run.teacher_positions
    rows = run.accumulation * run.config.train.micro_batch_size * run.needs.teacher_tokens * run.needs.target_logprobs
    work = positions * _position_flops(teacher, run.teacher_length) + 2.0 * rows * teacher.vocab * teacher.hidden
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
