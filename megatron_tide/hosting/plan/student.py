"""What the student takes: states, gradients, activations; as DeepSpeed 0.19 holds them under our settings.

Bytes a parameter (w = ranks, b = 2 in bf16, 4 in fp32; measured on CPU, part by part):

    always       weights b, fp32 masters 4/w, Adam's moments 8/w
    bf16, ZeRO 1 (its BF16_Optimizer): fp32 gradients 4, whole on each rank, always; bf16 ones 2 from backward to update
    others       fp32 gradients 4/w (ZeRO 1 in fp32: 4) from backward to update; backward fills a bucket of 4 more, or
                 two with overlap_comm, and copies its share out of it, 4/w; the update of fp32 flattens its share, 4/w
    update       torch's AdamW makes 8/w of temporaries on CPU and 4/w on a GPU, DeepSpeed's CPU Adam none
    offload      masters, moments and fp32 gradients lie on the host, with a flat copy of b/w, gradients twice, and
                 room for the largest tensor on both sides
    start        the fp32 weights are kept beside what DeepSpeed makes of them until its masters are exact again, 4
    checkpoint   rank 0 gathers fp32 tensors of 4, one file after another
"""

from __future__ import annotations

from megatron_tide.hosting.plan.books import Books
from megatron_tide.hosting.plan.job import FP32, Job
from megatron_tide.models.head import LOGIT_BYTES

BUCKET = 500_000_000  # numbers: DeepSpeed's default reduce_bucket_size
# Logit pieces alive at once where whole distributions are compared: both sides', scaled, their log-probs, autograd's
# (measured in the backward pass at 150,000 tokens).
COMPARED = 8
BACKWARD, REDUCTION, UPDATE = "student backward", "student reduction", "student update"


def add_student(books: Books, job: Job) -> None:
    """Enter everything of the student."""
    zero = job.deepspeed["zero_optimization"]
    offloads = "offload_optimizer" in zero
    _states(books, job, offloads)
    if job.precision.itemsize < FP32 and zero["stage"] == 1:
        _gradients_beside(books, job)
    else:
        _gradients_in_buckets(books, job, offloads)
    _activations(books, job)
    _logits(books, job)
    books.disk["student checkpoints"] = job.checkpoints * 3 * FP32 * job.student.parameters


def _states(books: Books, job: Job, offloads: bool) -> None:
    count, size = job.student.parameters, job.precision.itemsize
    share = count / job.ranks
    books.hold("student weights", size * count)
    books.hold("student master weights", FP32 * share, host=offloads)
    books.hold("student moments", 2 * FP32 * share, host=offloads)
    if offloads:
        largest = size * max(job.student.tensors)
        books.hold("student buffers", size * share + FP32 * share + largest, host=True)
        books.hold("student buffers", largest)
    else:
        adam = 1 if books.machine.has_gpus else 2
        books.use(UPDATE, "Adam's temporaries", adam * FP32 * share)
    # Weights arrive as fp32 on the host; on a GPU machine that is one copy more.
    copies = 2 if books.machine.has_gpus else 1
    books.use("start", "student as it was loaded", copies * FP32 * count, host=True)
    books.use("checkpoint", "gathered checkpoint", FP32 * count, host=True, ranks=1)


def _gradients_beside(books: Books, job: Job) -> None:
    """bf16 with ZeRO 1: fp32 gradients are one buffer; backward makes bf16 ones, which are added to it."""
    count = job.student.parameters
    books.hold("student gradients", FP32 * count)
    for phase in (BACKWARD, REDUCTION, UPDATE):
        _per_tensor(books, job, phase, job.precision.itemsize)
    if count < BUCKET:  # more than a bucket is reduced where it lies
        books.use(REDUCTION, "reduction buckets", FP32 * count)


def _gradients_in_buckets(books: Books, job: Job, offloads: bool) -> None:
    zero, count = job.deepspeed["zero_optimization"], job.student.parameters
    share, exact, first = count / job.ranks, job.precision.itemsize == FP32, zero["stage"] == 1
    bucket = zero.get("reduce_bucket_size", BUCKET)
    touched = min(count, bucket)
    # On a GPU a bucket is there, whole, from the first gradient on; on the host its pages are, once they are filled.
    filled = (2 if zero.get("overlap_comm", False) else 1) * bucket if books.machine.has_gpus else touched
    during = BACKWARD if not first and (books.machine.has_gpus or touched < count) else REDUCTION
    books.use(during, "reduction buckets", FP32 * filled)
    if not exact:
        _per_tensor(books, job, REDUCTION, FP32, touched / count)
    elif not first and not offloads:
        books.use(REDUCTION, "reduction buckets", FP32 * share)
    if first:
        _per_tensor(books, job, BACKWARD, FP32)
    for phase in (REDUCTION, UPDATE) if first else (BACKWARD, REDUCTION, UPDATE):
        books.use(phase, "student gradients", FP32 * (count if first else share), host=offloads)
    if exact and not offloads:
        books.use(UPDATE, "student gradients", FP32 * share)


def _per_tensor(books: Books, job: Job, phase: str, size: int, part: float = 1.0) -> None:
    """Gradients in numbers of ``size`` bytes, each parameter's on its own; ``part`` of them at once."""
    small = job.student.small(size)
    books.use(phase, "student gradients", part * small, 0)
    books.use(phase, "student gradients", part * (size * job.student.parameters - small))


def _activations(books: Books, job: Job) -> None:
    """Without recomputation every layer's saved tensors; with it every layer's input, and one layer's at a time."""
    size, positions, layers = job.precision.itemsize, job.student_positions, job.student.layers
    hidden = size * job.student.hidden
    largest = positions * max(layer.largest(size) for layer in layers)
    saved = [layer.saved(size) for layer in layers]
    if job.recompute:
        books.use(BACKWARD, "student activations", positions * hidden * len(layers), positions * hidden)
        saved = [max(saved)]
    books.use(BACKWARD, "student activations", positions * sum(saved), largest)
    # Gradients of activations, about as much as one layer works with; positions turned to cosines and sines.
    books.use(BACKWARD, "student activations", positions * max(x.working(size) for x in layers), largest)
    if not books.machine.has_gpus:  # the CPU's attention takes a dense additive mask
        mask = positions * job.student_length * size
        books.use(BACKWARD, "attention masks", mask, mask)


def _logits(books: Books, job: Job) -> None:
    """One piece of fp32 logits (in bf16 also as they were multiplied), and a gradient of the output embedding."""
    size, vocab = job.precision.itemsize, job.student.vocab
    rows = job.micro_batch_size * job.student_tokens
    piece = min(LOGIT_BYTES, FP32 * rows * vocab)
    pieces = COMPARED if job.hidden else 1 if size == FP32 else 2
    books.use(BACKWARD, "head's logits", pieces * piece, piece)
    embedding = size * vocab * job.student.hidden
    books.use(BACKWARD, "head's gradients", embedding)
