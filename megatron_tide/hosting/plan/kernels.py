"""What oneDNN compiles on CPU: code for every shape of a bf16 matmul, which it keeps for the last 1024 of them.

A shape costs 0.65 MB, however small its matrices (measured from 64 x 64 to 3072 x 1024, forward and backward; fp32 goes
another way and costs nothing). Rows of an expert, and masked rows of a micro-batch, are of any number, so new shapes
come with every step, fewer and fewer of them; a long run fills the cache.
"""

from __future__ import annotations

import math

import torch

from megatron_tide.hosting.flat_layers import TOKENS_AT_ONCE
from megatron_tide.hosting.plan.job import Job, Model

BYTES, MOST = 0.66e6, 1024
LAYER_SHAPES = 15  # matmuls of one layer of a student, forward and backward, for one number of positions
HEAD_SHAPES = 5  # and of its head, for one number of rows
LENGTHS = 16  # numbers of positions that differ: lengths are rounded up to whole blocks


def kernel_bytes(job: Job) -> float:
    """Bytes of compiled matmuls at the end of ``job.steps`` steps, on one rank without a GPU."""
    micro_batches = job.steps * job.accumulation
    shapes = 0.0
    if job.precision == torch.bfloat16:
        shapes += LAYER_SHAPES * min(micro_batches, LENGTHS) + HEAD_SHAPES * micro_batches
    if job.teacher is not None and job.teacher_dtype == torch.bfloat16:
        shapes += LAYER_SHAPES / 3 * min(micro_batches, LENGTHS) + micro_batches + _expert_shapes(job, job.teacher)
    return BYTES * min(MOST, shapes)


def _expert_shapes(job: Job, teacher: Model) -> float:
    """Two shapes (into an expert, out of it) for each number of rows that ever occurs.

    Routers are far from even: row counts spread about as an exponential distribution does, of which n draws with mean
    m take m log(1 + n / m) different whole values.
    """
    config = teacher.config
    layers = sum(layer.experts > 0 for layer in teacher.layers)
    if not layers:
        return 0.0
    together = min(job.accumulation, max(1, TOKENS_AT_ONCE // job.teacher_positions))
    mean = together * job.teacher_positions * config.num_experts_per_tok / config.num_experts
    draws = job.steps * job.accumulation / together * layers * config.num_experts
    return 2 * mean * math.log1p(draws / mean)
