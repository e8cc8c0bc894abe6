"""What the teacher takes in each hosting: weights or shares, buffers, activations of a sweep; bytes on disk.

    resident   the weights, whole, and one micro-batch's activations
    zero3      on each rank 1/w of every unit, and two units gathered: the one at work and the next
      cpu      the shares lie on the host (pinned for a GPU: torch rounds each up to a power of two)
      nvme     the shares lie on disk, BUFFERS of the largest on the host; one unit gathered
    pipeline   the units of the heaviest stage

A rank alone needs no gathered copy where its share lies on the device already. A sweep keeps the hidden states of all
micro-batches of the window; a pipeline stage sees one at a time. Loading needs one unit whole on the device, and the
pages of one checkpoint file. Distribution objectives keep the output embedding on every rank.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from megatron_tide.ds_config import offload_of
from megatron_tide.hosting.flat_layers import TOKENS_AT_ONCE, FlatLayer
from megatron_tide.hosting.layerwise import make_flat_layers
from megatron_tide.hosting.pipeline import balanced
from megatron_tide.hosting.plan.books import Books
from megatron_tide.hosting.plan.job import FP32, Job, Model
from megatron_tide.hosting.plan.ledger import PAGES
from megatron_tide.hosting.zero3 import BUFFERS
from megatron_tide.models.head import LOGIT_BYTES
from megatron_tide.models.shards import MAX_SHARD_BYTES

LOADING, SWEEP = "teacher loading", "teacher sweep"


def teacher_units(job: Job, teacher: Model) -> list[FlatLayer]:
    """The units that are sharded or dealt to stages, empty."""
    output = torch.empty(0, device="meta") if job.hidden else None
    return make_flat_layers(teacher.sections, job.teacher_dtype, output=output, gold=job.gold)


def add_resident(books: Books, job: Job, teacher: Model, settings: dict[str, Any]) -> None:
    size = job.teacher_dtype.itemsize
    books.hold("teacher weights", size * teacher.parameters, LOADING)
    stored = job.stored_bytes or min(size * teacher.parameters, MAX_SHARD_BYTES)
    books.use(LOADING, PAGES, stored, host=True)
    _sweep(books, job, teacher, micro_batches=1)


def add_zero3(books: Books, job: Job, teacher: Model, settings: dict[str, Any]) -> None:
    offload = offload_of(settings)
    sizes = [unit.flat_bytes for unit in teacher_units(job, teacher)]
    _PLACES[offload.get("device", "none")](books, job, sizes, offload)
    _output(books, job, teacher)
    books.use(LOADING, "teacher unit being loaded", max(sizes))
    books.use(LOADING, PAGES, min(max(sizes), job.stored_bytes or MAX_SHARD_BYTES), host=True, ranks=1)
    _sweep(books, job, teacher, micro_batches=job.accumulation)


def _on_device(books: Books, job: Job, sizes: list[int], offload: dict[str, Any]) -> None:
    books.hold("teacher weights", sum(sizes) / job.ranks, LOADING)
    if job.ranks > 1:
        books.use(SWEEP, "teacher buffers", 2 * max(sizes), max(sizes))


def _on_host(books: Books, job: Job, sizes: list[int], offload: dict[str, Any]) -> None:
    gpu = books.machine.has_gpus
    shares = [-(-size // job.ranks) for size in sizes]
    rounded = gpu and offload.get("pin_memory", False)
    books.hold("teacher weights", sum(map(_power_of_two, shares) if rounded else shares), LOADING, host=True)
    if rounded:
        books.use(LOADING, "teacher buffers", max(shares), host=True)  # before it is pinned
    if gpu or job.ranks > 1:
        alone = job.ranks == 1
        books.use(SWEEP, "teacher buffers", 2 * max(sizes) + (0 if alone else max(shares)), max(sizes))


def _on_disk(books: Books, job: Job, sizes: list[int], offload: dict[str, Any]) -> None:
    share = -(-max(sizes) // job.ranks)
    books.hold("teacher buffers", BUFFERS * share, LOADING, host=True)
    if books.machine.has_gpus or job.ranks > 1:
        books.use(SWEEP, "teacher buffers", max(sizes) + (share if job.ranks > 1 else 0), max(sizes))
    books.disk["teacher weights"] = sum(sizes) // books.machine.nodes


_PLACES = {"none": _on_device, "cpu": _on_host, "nvme": _on_disk}


def add_pipeline(books: Books, job: Job, teacher: Model, settings: dict[str, Any]) -> None:
    books.hold("teacher weights", heaviest_stage(job, teacher, settings["pipeline"]["stages"]), LOADING)
    _output(books, job, teacher)
    pages = max(unit.flat_bytes for unit in teacher_units(job, teacher))
    books.use(LOADING, PAGES, min(pages, job.stored_bytes or MAX_SHARD_BYTES), host=True)
    _sweep(books, job, teacher, micro_batches=1)


def heaviest_stage(job: Job, teacher: Model, stages: int) -> int:
    """Bytes of the heaviest stage; ValueError where there are more stages than units."""
    units = teacher_units(job, teacher)
    bounds = balanced(units, stages)
    return max(sum(u.flat_bytes for u in units[first:last]) for first, last in itertools.pairwise(bounds))


def _output(books: Books, job: Job, teacher: Model) -> None:
    if job.hidden:
        books.hold("teacher weights", job.teacher_dtype.itemsize * teacher.vocab * teacher.hidden, LOADING)


def _sweep(books: Books, job: Job, teacher: Model, micro_batches: int) -> None:
    """Hidden states, rotations and masks of the window; what a layer works with; a piece of the head's logits."""
    size, positions = job.teacher_dtype.itemsize, job.teacher_positions
    kept = positions * size * (teacher.hidden + 2 * teacher.config.head_dim)
    books.use(SWEEP, "teacher activations", micro_batches * kept, kept)
    together = positions * min(micro_batches, max(1, TOKENS_AT_ONCE // positions))
    layer = max(teacher.layers, key=lambda layer: layer.working(size))
    at_once = together if layer.experts else positions
    books.use(SWEEP, "teacher activations", at_once * layer.working(size), at_once * layer.largest(size))
    if not books.machine.has_gpus:  # the CPU's attention takes a dense additive mask
        mask = positions * job.teacher_length * size
        books.use(SWEEP, "attention masks", (micro_batches + 1) * mask, mask)
    if job.gold:
        piece = min(LOGIT_BYTES, FP32 * job.micro_batch_size * job.teacher_tokens * teacher.vocab)
        books.use(SWEEP, "head's logits", piece * (1 if size == FP32 else 1.5), piece)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
