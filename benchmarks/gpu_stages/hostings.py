"""Stage f: a teacher sharded by ZeRO-3, in host memory and on disk, against a resident one: answers, GB/s, peak.

Four layers of the 16B teacher's widths with a quarter of its experts. A sweep over nothing says what the way to the
weights gives; the planner's number is what `plan` expects of the teacher on the card in its forward pass.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_stages.bench import Bench
from benchmarks.gpu_stages.full import config_of, training
from benchmarks.hosting import GOLD, make_microbatches, write_teacher
from megatron_tide.config import from_flat
from megatron_tide.diffusion import DistillBatch
from megatron_tide.ds_config import offload_of
from megatron_tide.ds_ops import refuse_missing_disk_tools
from megatron_tide.hosting.backend import TeacherBackend
from megatron_tide.hosting.build import named_hosting
from megatron_tide.hosting.memory import Machine, ModelShape, RunShape, TeacherNeeds, estimate_memory
from megatron_tide.hosting.replicated import ReplicatedTeacher
from megatron_tide.hosting.zero3 import Zero3Teacher
from megatron_tide.train.distributed import DistContext

LAYERS, EXPERTS, VOCABULARY = 4, 64, 19648
DTYPE = torch.bfloat16
OF_THE_TEACHER = ("teacher weights", "teacher activations", "gathered layers", "head's logits")
AGREE = 0.05  # of the spread of log-probs


def run(bench: Bench) -> None:
    config = config_of("teacher", bench.tiny, 2 if bench.tiny else LAYERS)
    if not bench.tiny:
        config |= {"num_experts": EXPERTS, "vocab_size": VOCABULARY, "mask_token_id": VOCABULARY - 1}
        config |= {"pad_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 2}
    folder = bench.folder / "teacher"
    folder.mkdir()
    bench.note(teacher_bytes=write_teacher(folder, config, DTYPE))
    with training(bench) as world:
        microbatches = [batch.to(world.device) for batch in make_microbatches(config, 2, 2, 32 if bench.tiny else 512)]
        wanted = resident_answer(bench, world, folder, microbatches)
        for name in ("zero3", "zero3_cpu", *(() if bench.tiny else ("zero3_nvme",))):
            if why := reason_against(name):
                bench.note(**{name: {"skipped": why}})
                continue
            with bench.part(name):
                found = measured(bench, world, name, folder, microbatches, wanted)
                bench.note(**{name: {**found, "planned_device_bytes": planned(bench, config, name)}})


def reason_against(name: str) -> str:
    """Why this machine cannot have a hosting; "" if it can."""
    if offload_of(named_hosting(name).settings).get("device") == "nvme":
        try:
            refuse_missing_disk_tools()
        except ValueError as error:
            return str(error)
    return ""


def resident_answer(bench: Bench, world: DistContext, folder: Path, microbatches: list[DistillBatch]) -> torch.Tensor:
    backend = ReplicatedTeacher.open(str(folder), {}, DTYPE, GOLD, world)  # type: ignore[arg-type]
    answer = scored(backend, microbatches)
    bench.note(resident_seconds=bench.seconds(lambda: backend.score(microbatches)))
    return answer


def measured(
    bench: Bench, world: DistContext, name: str, folder: Path, microbatches: list[DistillBatch], wanted: torch.Tensor
) -> dict[str, Any]:
    """Two sweeps of a hosting: DeepSpeed learns the order of the layers in the first."""
    settings = named_hosting(name).settings
    offload = offload_of(settings)
    if offload.get("device") == "nvme":
        offload["nvme_path"] = str(bench.folder)
    before = torch.cuda.memory_allocated() if bench.cuda else 0
    opened: list[Zero3Teacher] = []
    loading = bench.seconds(lambda: opened.append(Zero3Teacher.open(str(folder), settings, DTYPE, GOLD, world)))  # type: ignore[arg-type]
    (backend,) = opened
    answer = scored(backend, microbatches)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = bench.seconds(lambda: scored(backend, microbatches))
    peak = torch.cuda.max_memory_allocated() - before if bench.cuda else 0
    empty = bench.seconds(lambda: backend.engine([]))
    apart = float((answer - wanted).std() / wanted.std())
    if not apart < AGREE:
        raise AssertionError(f"{name}'s log-probs differ from the resident teacher's by {apart:.3f} of their spread")
    return {
        "identical": bool(torch.equal(answer, wanted)),
        "apart_over_spread": apart,
        "loading_seconds": loading,
        "sweep_seconds": taken,
        "sweep_over_nothing_seconds": empty,
        "gbs": sum(layer.flat_bytes for layer in backend.flat_layers) / empty / 1e9,
        "device_peak_bytes": peak,
    }


def scored(backend: TeacherBackend, microbatches: list[DistillBatch]) -> torch.Tensor:
    return torch.cat([outputs.target_logprobs for outputs in backend.score(microbatches)])  # type: ignore[misc]


def planned(bench: Bench, config: dict[str, Any], name: str) -> int:
    """Bytes that the planner expects of the teacher on the card, its margin for the transient ones included."""
    flags = {"micro_batch_size": 2, "global_batch_size": 4, "compdemo": True}
    needs = TeacherNeeds(target_logprobs=True, hidden=False, compdemo=True, student_tokens=512, teacher_tokens=512)
    student = ModelShape(config_of("student", bench.tiny))
    run = RunShape(config=from_flat(flags), ranks=1, needs=needs, student=student, teacher=ModelShape(config))
    machine = Machine(ranks=1, gpu_bytes=80 * 10**9, host_bytes=128 * 10**9, disk_bytes=10**12)
    parts = estimate_memory(run, machine, named_hosting(name).settings).at("teacher forward", host=False).parts
    return sum(parts.get(part, 0) for part in (*OF_THE_TEACHER, "margin"))
