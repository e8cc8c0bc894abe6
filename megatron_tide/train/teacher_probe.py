"""Is this teacher the right one? Asked once, before the first step, of the first window's samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from megatron_tide.diffusion import DistillBatch
from megatron_tide.models import target_logprobs
from megatron_tide.objectives import TeacherOutputs
from megatron_tide.train.step import TrainContext, to_device


def check_teacher(
    context: TrainContext, microbatches: Sequence[DistillBatch], vocab_size: int, teacher: str, mask_id: int
) -> float:
    """Mean log-prob (nats) of the target tokens of ``microbatches`` under the teacher, over all ranks (a collective).

    Raises:
        ValueError: on every rank alike, where it is not finite, or no better than a uniform guess over ``vocab_size``.
    """
    microbatches = to_device(microbatches, context.world.device)
    teacher_outputs = context.backend.score(microbatches)
    gold = torch.cat([_gold(batch, outputs).double() for batch, outputs in zip(microbatches, teacher_outputs)])
    total, count = context.world.sum_over_ranks([gold.sum().item(), float(len(gold))])
    mean, uniform = total / max(count, 1.0), -math.log(vocab_size)
    if count and not mean > uniform:  # a NaN is not greater than anything
        said = f"{mean:.2f} nats" if math.isfinite(mean) else "log-probs that are not finite"
        raise ValueError(
            f"{teacher}: gives the data's own tokens {said} on average, a uniform guess {uniform:.2f}: wrong "
            f"weights, a wrong mask token (id {mask_id}), or another chat template; --skip-teacher-probe goes on anyway"
        )
    return mean


def _gold(batch: DistillBatch, outputs: TeacherOutputs) -> torch.Tensor:
    """The gold log-probs that were asked for, or those of the pairs, from their hidden rows."""
    if outputs.target_logprobs is not None:
        return outputs.target_logprobs
    assert outputs.hidden is not None
    assert outputs.head_weight is not None
    return target_logprobs(outputs.hidden, outputs.head_weight, batch.teacher_targets[batch.pair_teacher_index])
