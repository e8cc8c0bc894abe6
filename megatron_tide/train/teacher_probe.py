"""Check once, before the first step, that the teacher predicts the first step's data better than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_tide.diffusion import DistillBatch
from megatron_tide.models import target_logprobs
from megatron_tide.objectives import TeacherOutputs
from megatron_tide.train.step import TrainContext, to_device


def check_teacher(
    context: TrainContext, microbatches: Sequence[DistillBatch], teacher: str, side: Mapping[str, Any]
) -> float:
    """Mean log-prob (nats) of the target tokens of ``microbatches`` under the teacher, over all ranks (a collective).

    ``side``: the teacher's part of the data's manifest.

    Raises:
        ValueError: on all ranks, when it is not finite, or no better than a uniform guess over the vocabulary.
    """
    microbatches = to_device(microbatches, context.world.device)
    teacher_outputs = context.backend.score(microbatches)
    gold = torch.cat([_logprobs(batch, outputs).double() for batch, outputs in zip(microbatches, teacher_outputs)])
    total, count = context.world.sum_over_ranks([gold.sum().item(), float(len(gold))])
    mean, uniform = total / max(count, 1.0), -math.log(side["vocab_size"])
    if count and not mean > uniform:  # a NaN is not greater than anything
        found = f"{mean:.2f} nats" if math.isfinite(mean) else "not finite"
        wrong_mask = "" if side["mask_id"] is None else f"a wrong mask token (id {side['mask_id']}), "
        raise ValueError(
            f"{teacher}: mean log-prob of the data's tokens is {found}, a uniform guess gives {uniform:.2f}: "
            f"wrong weights, {wrong_mask}or another chat template; "
            "--skip-teacher-probe skips this check"
        )
    return mean


def _logprobs(batch: DistillBatch, outputs: TeacherOutputs) -> torch.Tensor:
    """The target log-probs of the outputs, or those of the pairs, computed from their hidden states."""
    if outputs.target_logprobs is not None:
        return outputs.target_logprobs
    assert outputs.hidden is not None
    assert outputs.head_weight is not None
    return target_logprobs(outputs.hidden, outputs.head_weight, batch.teacher_targets[batch.pair_teacher_index])
