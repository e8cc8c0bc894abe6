"""Memory of a run on each GPU, in host memory and on disk, part by part, computed before anything is allocated.

P parameters, w ranks, b bytes per number (2 in bf16, 4 in fp32):

    student   weights bP; master weights 4P/w and moments 8P/w (in host memory with offload_optimizer; of
              matrices with Muon 4P/w)
              gradients: bf16 with ZeRO 1 4P always and 2P from backward to update; else 4P/w (fp32 with ZeRO 1: 4P)
              reduce buckets; AdamW's temporaries 8P/w on a CPU, 4P/w on a GPU; fp32 weights 4P while it is loaded
              activations of all layers, or with recomputation all layers' inputs and one layer's activations
    teacher   replicated: all weights; pipeline: the heaviest stage
              zero3: 1/w of every layer on the device, in host memory or on disk; gathered layers on the device
    process   libraries and caches; on a GPU the CUDA context and NCCL communicators

The student's rows were measured part by part on CPU with DeepSpeed 0.19. Persistent parts stay from some phase on;
transient parts exist in certain phases, and :data:`MARGIN` is added to them for unlisted ones. Predicted over
measured peak on CPU: 1.03 at full size (0.6 B from 16 B), 1.06 to 1.46 in nine runs of a 20 M student. No GPU's peak
has been measured yet.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch

from megatron_tide.choices import ATTENTION_LAYOUTS, OPTIMIZERS
from megatron_tide.config import DistillConfig
from megatron_tide.diffusion.layouts import staircase
from megatron_tide.ds_config import offload_of, read_ds_config
from megatron_tide.fast import ON_CPU, PieceSizes, is_on, on_gpu
from megatron_tide.hosting.build import DTYPES
from megatron_tide.hosting.layerwise import make_flat_layers
from megatron_tide.hosting.pipeline import balanced
from megatron_tide.hosting.zero3 import BUFFERS
from megatron_tide.models.checkpoint_keys import module_tensors
from megatron_tide.models.families import ConfigSource
from megatron_tide.models.layer_specs import layer_specs_of
from megatron_tide.optimizer import FP32, ParameterCounts, hidden_matrices

LOAD_STUDENT, LOAD_TEACHER, FORWARD, BACKWARD, REDUCE, UPDATE, CHECKPOINT = PHASES = (
    "student loading",
    "teacher loading",
    "teacher forward",
    "student backward",
    "gradient reduction",
    "optimizer update",
    "checkpoint",
)

# Share of the transient parts that is added to them: temporaries of kernels, fragmentation of the allocator. Measured
# on CPU: 0.15 in the full-size step (benchmarks/results/fullsize_cpu.json), more in some runs of a 20 M student.
# Assumed to be the same on GPUs.
MARGIN = 0.25
# Memory of a CPU process without its tensors, by precision: 0.47 GB of imports (torch, DeepSpeed, transformers); freed
# memory that glibc keeps; in bf16, matmul kernels that oneDNN compiles. Measured in runs of a 20 M student.
PROCESS = {torch.float32: 0.85e9, torch.bfloat16: 1.15e9}
# Process with the CUDA build: host memory, and the CUDA context on its GPU. Usual figures, not measured here.
CUDA_PROCESS, CUDA_CONTEXT = 3.0e9, 0.8e9
# Each NCCL communicator of several ranks, on each GPU (assumed, not measured). Torch and DeepSpeed have one of all
# ranks each; a pipeline adds DeepSpeed's grid and ours.
COMMUNICATOR, COMMUNICATORS, PIPELINE_COMMUNICATORS = 0.25e9, 2, 6
# Layers gathered on a GPU at once: the one at work, the next one, and up to three that DeepSpeed 0.19 has released but
# whose kernels are not done (by its source, not measured). These are five; MARGIN makes five of the four.
GATHERED_LAYERS = 4
BUCKET = 500_000_000  # numbers that DeepSpeed reduces at once by default, and always in bf16 with ZeRO 1
# Numbers per number that a layer's matmuls produce: kept for the backward pass (norms and rotations included), and
# alive at the peak of a forward pass. Counted in Qwen3's and LLaDA2's layers: 2.7 to 3.1 and 1.8.
SAVED, WORKING = 3, 2
# Slices of logits at once if full distributions are compared: both models', scaled, their log-probs, autograd's.
# Measured in the backward pass at a vocabulary of 150,000.
COMPARED_SLICES = 8


@dataclass(frozen=True)
class Machine:
    """``nodes`` equal nodes with ``ranks`` processes each.

    Bytes: of each GPU (0: there is none, a rank computes on the host), of a node's memory, and free on a node's disk
    for the teacher (0: no such disk).
    """

    ranks: int
    gpu_bytes: int
    host_bytes: int
    disk_bytes: int = 0
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.ranks * self.nodes

    @property
    def has_gpus(self) -> bool:
        return self.gpu_bytes > 0

    @property
    def piece_sizes(self) -> PieceSizes:
        return on_gpu(self.gpu_bytes) if self.has_gpus else ON_CPU


class ModelShape:
    """Sizes of a model, from its ``config.json``; nothing is allocated."""

    def __init__(self, source: ConfigSource, *, as_student: bool = False) -> None:
        self.specs = layer_specs_of(source, as_student=as_student)
        self.config: Any = self.specs.config
        numels = [tensor.numel() for tensor in module_tensors(self.specs.model).values()]
        self.parameters, self.largest_tensor = sum(numels), max(numels)
        hidden = [parameter.numel() for parameter in hidden_matrices(self.specs.model).values()]
        self.sizes = ParameterCounts(self.parameters, sum(hidden), max(hidden, default=0))
        self.vocab, self.hidden = self.config.vocab_size, self.config.hidden_size
        # Per layer: numbers that its matmuls produce per position, and parameters that a position is multiplied with.
        self.widths, self.active_parameters, chosen = [], 0.0, getattr(self.config, "num_experts_per_tok", 0)
        for layer in self.specs.layers:
            matrices = [tensor for tensor in layer.tensors.values() if tensor.ndim > 1]  # [(experts,) out, in]
            self.widths.append(sum(m.shape[-2] * (chosen if m.ndim == 3 else 1) for m in matrices))
            self.active_parameters += sum(m.shape[-2:].numel() * (chosen if m.ndim == 3 else 1) for m in matrices)


@dataclass(frozen=True, kw_only=True)
class TeacherNeeds:
    """What the objectives need from the teacher, and the tokens of the longest sample of both models."""

    target_logprobs: bool
    hidden: bool
    compdemo: bool
    student_tokens: int
    teacher_tokens: int


@dataclass(frozen=True, kw_only=True)
class RunShape:
    """A run of ``config`` on ``ranks`` ranks. ``teacher`` None: no distillation."""

    config: DistillConfig
    ranks: int
    needs: TeacherNeeds
    student: ModelShape
    teacher: ModelShape | None

    @cached_property
    def deepspeed(self) -> dict[str, Any]:
        """The ``zero_optimization`` of the student's DeepSpeed JSON."""
        return read_ds_config(self.config.train.deepspeed, "--deepspeed")["zero_optimization"]

    @property
    def pins_student(self) -> bool:
        """Whether the offloaded optimizer's memory is page-locked."""
        return bool(self.deepspeed.get("offload_optimizer", {}).get("pin_memory", False))

    @property
    def student_dtype(self) -> torch.dtype:
        return DTYPES[self.config.train.precision]

    @property
    def teacher_dtype(self) -> torch.dtype:
        return DTYPES[self.config.teacher.teacher_dtype]

    @property
    def accumulation(self) -> int:
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.ranks)

    @property
    def student_length(self) -> int:
        """Positions of the longest sample in the student's input, [xt ; x0] without the last block of x0."""
        return _staircase_length(self.needs.student_tokens, self.student.config.block_size)

    @property
    def teacher_length(self) -> int:
        """Positions of the longest sample in the teacher's input."""
        assert self.teacher is not None
        block, tokens = getattr(self.teacher.config, "block_size", 1), self.needs.teacher_tokens
        two_copies = ATTENTION_LAYOUTS[self.config.strategy.teacher_context] is staircase
        return _staircase_length(tokens, block) if two_copies else -(-tokens // block) * block

    @property
    def teacher_positions(self) -> int:
        """Positions of one micro-batch of the teacher, both passes of CompDemo together."""
        return self.config.train.micro_batch_size * (2 if self.needs.compdemo else 1) * self.teacher_length

    def layer_bytes(self, stages: int | None = None) -> list[int]:
        """Bytes of the teacher's embedding, layers and head, as zero3 shards them; or of each of ``stages`` stages."""
        assert self.teacher is not None
        head = torch.empty(0, device="meta") if self.needs.hidden else None
        scored = self.needs.target_logprobs
        layers = make_flat_layers(self.teacher.specs, self.teacher_dtype, head_weight=head, score_targets=scored)
        sizes = [layer.flat_bytes for layer in layers]
        return [sum(sizes[a:b]) for a, b in pairwise(balanced(layers, stages))] if stages else sizes


def _staircase_length(tokens: int, block: int) -> int:
    return -(-tokens // block) * block + (tokens - 1) // block * block


@dataclass(frozen=True)
class Peak:
    """The phase in which a place holds most, and the bytes of its parts."""

    phase: str
    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


class MemoryEstimate:
    """Parts held on each GPU, in a node's host memory and on its disk.

    Sizes are bytes per rank, on the rank's device (its GPU, or the host where there is none) or, with ``host``, in the
    node's memory, which its ``ranks`` (default: all of the node) share.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.disk: dict[str, int] = {}
        self._rows: list[tuple[str, float, Sequence[str], bool, float]] = []

    def persistent(self, part: str, size: float, *, since: str = LOAD_STUDENT, host: bool = False) -> None:
        """``size`` bytes from the phase ``since`` to the end."""
        self._add(part, size, PHASES[PHASES.index(since) :], host, self.machine.ranks, 0.0)

    def transient(self, part: str, size: float, *phases: str, host: bool = False, ranks: int | None = None) -> None:
        """``size`` bytes during ``phases``, and :data:`MARGIN` on top."""
        self._add(part, size, phases, host, ranks or self.machine.ranks, MARGIN)

    def _add(self, part: str, size: float, phases: Sequence[str], host: bool, ranks: int, margin: float) -> None:
        on_host = host or not self.machine.has_gpus
        self._rows.append((part, size * (ranks if on_host else 1), phases, on_host, margin))

    def peak(self, *, host: bool) -> Peak:
        """The fullest phase of the host, or of a GPU."""
        return max((self.at(phase, host=host) for phase in PHASES), key=lambda peak: peak.bytes)

    def at(self, phase: str, *, host: bool) -> Peak:
        """What the host, or a GPU, holds in a phase."""
        parts: dict[str, float] = defaultdict(float)
        for part, size, phases, on_host, margin in self._rows:
            if on_host == host and phase in phases:
                parts[part] += size
                parts["margin"] += margin * size
        return Peak(phase, {part: int(size) for part, size in parts.items() if size >= 1})


def estimate_memory(
    run: RunShape, machine: Machine, settings: dict[str, Any], *, trains: bool = True
) -> MemoryEstimate:
    """All parts of a run; ``settings``: the DeepSpeed JSON of the teacher's hosting, {} for a replicated one. Without
    ``trains``: the teacher alone.

    Raises:
        ValueError: more pipeline stages than the teacher has layers.
    """
    estimate = MemoryEstimate(machine)
    _add_process(estimate, run, "pipeline" in settings)
    if trains:
        _add_student(estimate, run)
        _add_gradients(estimate, run)
        _add_activations(estimate, run)
    if run.teacher is not None:
        _add_teacher(estimate, run, run.teacher, settings)
        # Pipelines, and a replicated teacher on a CPU, take one micro-batch after the other.
        layerwise = "zero_optimization" in settings or (not settings and machine.has_gpus and is_on("layerwise"))
        _add_teacher_forward(estimate, run, run.teacher, run.accumulation if layerwise else 1)
    return estimate


def _add_process(estimate: MemoryEstimate, run: RunShape, pipeline: bool) -> None:
    if not estimate.machine.has_gpus:
        dtypes = {run.student_dtype, run.teacher_dtype if run.teacher else run.student_dtype}
        estimate.persistent("process", max(PROCESS[dtype] for dtype in dtypes))
        return
    estimate.persistent("process", CUDA_PROCESS, host=True)
    estimate.persistent("CUDA context", CUDA_CONTEXT)
    if run.ranks > 1:
        count = COMMUNICATORS + (PIPELINE_COMMUNICATORS if pipeline else 0)
        estimate.persistent("NCCL communicators", count * COMMUNICATOR)


def _add_student(estimate: MemoryEstimate, run: RunShape) -> None:
    count, size = run.student.parameters, run.student_dtype.itemsize
    share, offload, gpus = count / run.ranks, "offload_optimizer" in run.deepspeed, estimate.machine.has_gpus
    optimizer = OPTIMIZERS[run.config.train.optimizer]
    estimate.persistent("student weights", size * count)
    locked = _page_locked if gpus and run.pins_student else float
    estimate.persistent("student master weights", locked(FP32 * share), host=offload)
    estimate.persistent("student moments", optimizer.state_bytes(run.student.sizes) / run.ranks, host=offload)
    if offload:  # a flat copy of the weights, the gradients again, buffers for the largest tensor on both sides
        largest = size * run.student.largest_tensor
        estimate.persistent("student buffers", locked(size * share) + locked(FP32 * share) + largest, host=True)
        estimate.persistent("student buffers", largest)
    if temporaries := optimizer.update_bytes(run.student.sizes, run.ranks, has_gpus=gpus, offloads=offload):
        estimate.transient("optimizer's temporaries", temporaries, UPDATE)
    # Loaded in fp32 on the host, where a GPU's rank makes one copy more.
    estimate.transient("student as it is loaded", (2 if gpus else 1) * FP32 * count, LOAD_STUDENT, host=True)
    estimate.transient("gathered checkpoint", FP32 * count, CHECKPOINT, host=True, ranks=1)
    save, steps = run.config.save, run.config.train.max_steps
    checkpoints = min(-(-steps // save.save_every), save.keep_last + 1) if steps else save.keep_last + 1
    estimate.disk["student checkpoints"] = checkpoints * (FP32 * count + optimizer.state_bytes(run.student.sizes))


def _page_locked(size: float) -> int:
    """Bytes that torch takes for page-locked memory of ``size`` bytes: the next power of two."""
    return 1 << (math.ceil(size) - 1).bit_length()


def _add_gradients(estimate: MemoryEstimate, run: RunShape) -> None:
    zero, count, size = run.deepspeed, run.student.parameters, run.student_dtype.itemsize
    share, offload, first = count / run.ranks, "offload_optimizer" in zero, zero["stage"] == 1
    if size < FP32 and first:  # one fp32 buffer, to which the bf16 gradients of each backward pass are added
        estimate.persistent("student gradients", FP32 * count)
        estimate.transient("student gradients", size * count, BACKWARD, REDUCE, UPDATE)
        if count < BUCKET:  # more than a bucket is reduced in place
            estimate.transient("reduce buckets", FP32 * count, REDUCE)
        return
    gradients: float = FP32 * (count if first else share)
    if estimate.machine.has_gpus and run.pins_student:
        gradients = _page_locked(gradients)
    estimate.transient("student gradients", gradients, BACKWARD, REDUCE, UPDATE, host=offload)
    bucket = zero.get("reduce_bucket_size", BUCKET)
    filled = min(bucket, count)  # on a CPU, memory that is not written to does not count
    buckets = (2 if zero.get("overlap_comm", False) else 1) * bucket if estimate.machine.has_gpus else filled
    estimate.transient("reduce buckets", FP32 * buckets, *((REDUCE,) if first else (BACKWARD, REDUCE)))
    if not first:
        estimate.transient("gradients being reduced", FP32 * (filled if size < FP32 else share), REDUCE)
    if size == FP32 and not offload:
        estimate.transient("flattened gradients", FP32 * share, UPDATE)


def _add_activations(estimate: MemoryEstimate, run: RunShape) -> None:
    student, train = run.student, run.config.train
    size, positions = run.student_dtype.itemsize, train.micro_batch_size * run.student_length
    saved = SAVED * sum(student.widths)
    if train.activation_checkpointing:
        saved = student.hidden * len(student.widths) + SAVED * max(student.widths)
    saved += WORKING * max(student.widths)  # gradients of activations
    estimate.transient("student activations", positions * size * saved, BACKWARD)
    if not estimate.machine.has_gpus:  # attention on a CPU takes a dense additive mask
        estimate.transient("attention masks", positions * size * run.student_length, BACKWARD)
    logits = min(
        estimate.machine.piece_sizes.logit_bytes,
        FP32 * train.micro_batch_size * run.needs.student_tokens * student.vocab,
    )
    slices = COMPARED_SLICES if run.needs.hidden else 1 if size == FP32 else 2
    estimate.transient("head's logits", slices * logits, BACKWARD)
    estimate.transient("head's gradients", size * student.vocab * student.hidden, BACKWARD)


def _add_teacher(estimate: MemoryEstimate, run: RunShape, teacher: ModelShape, settings: dict[str, Any]) -> None:
    size, gpus = run.teacher_dtype.itemsize, estimate.machine.has_gpus
    loaded = partial(estimate.persistent, "teacher weights", since=LOAD_TEACHER)
    if not settings:
        loaded(size * teacher.parameters)
        return
    if run.needs.hidden:  # the output embedding is on every rank
        loaded(size * teacher.vocab * teacher.hidden)
    if "pipeline" in settings:
        loaded(max(run.layer_bytes(settings["pipeline"]["stages"])))
        return
    layers, offload = run.layer_bytes(), offload_of(settings)
    shares, device = [-(-layer // run.ranks) for layer in layers], offload.get("device", "none")
    if device == "nvme":
        estimate.persistent("teacher buffers", BUFFERS * max(shares), since=LOAD_TEACHER, host=True)
        estimate.disk["teacher weights"] = sum(layers) // estimate.machine.nodes
    elif device == "cpu" and gpus and offload.get("pin_memory", False):
        loaded(sum(_page_locked(share) for share in shares), host=True)
        estimate.transient("teacher layer before it is pinned", max(shares), LOAD_TEACHER, host=True)
    else:
        loaded(sum(shares), host=device == "cpu")
    estimate.transient("teacher layer being loaded", max(layers), LOAD_TEACHER)
    if gpus and (run.ranks > 1 or device != "none"):
        estimate.transient("gathered layers", GATHERED_LAYERS * max(layers), FORWARD)
    elif run.ranks > 1:
        estimate.transient("gathered layers", 2 * max(layers) + max(shares), FORWARD)


def _add_teacher_forward(estimate: MemoryEstimate, run: RunShape, teacher: ModelShape, micro_batches: int) -> None:
    """Hidden states and rotary tables of ``micro_batches`` at once, one layer at work, a slice of the head's logits."""
    size, positions = run.teacher_dtype.itemsize, run.teacher_positions
    kept = micro_batches * positions * (teacher.hidden + 2 * teacher.config.head_dim)
    together = max(positions, min(micro_batches * positions, estimate.machine.piece_sizes.tokens))  # in one layer
    estimate.transient("teacher activations", size * (kept + together * WORKING * max(teacher.widths)), FORWARD)
    if not estimate.machine.has_gpus:
        masks = (micro_batches + 1) * positions * run.teacher_length * size
        estimate.transient("attention masks", masks, FORWARD)
    if run.needs.target_logprobs:
        rows = run.config.train.micro_batch_size * run.needs.teacher_tokens
        logits = min(estimate.machine.piece_sizes.logit_bytes, FP32 * rows * teacher.vocab)
        estimate.transient("head's logits", logits * (1 if size == FP32 else 1.5), FORWARD)
