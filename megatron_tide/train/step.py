"""One optimizer step: micro-batches -> teacher outputs -> student scores -> loss -> update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_tide.clock import Clock
from megatron_tide.diffusion import DistillBatch
from megatron_tide.hosting.backend import NoTeacher, TeacherBackend
from megatron_tide.models import masked_hidden_states
from megatron_tide.objectives import Counts, Strategy, denoise_loss, next_token_loss
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.metrics import MetricAccumulator, denoise_metrics


@dataclass(frozen=True)
class TrainContext:
    """The objects that a step uses; built once."""

    engine: Any  # DeepSpeed's
    backend: TeacherBackend
    strategy: Strategy
    world: DistContext
    clock: Clock

    def with_strategy(self, strategy: Strategy) -> TrainContext:
        """For a phase with this strategy: one that does not distil leaves the teacher out."""
        return replace(self, strategy=strategy, backend=self.backend if strategy.needs_teacher else NoTeacher())


def train_step(
    context: TrainContext, microbatches: Sequence[DistillBatch], counts: Counts, progress: float
) -> MetricAccumulator:
    """Take one optimizer step over this rank's micro-batches; returns sums and counts of all metrics, on the device.

    Losses are local sums over ``counts``, which are global: the ranks' gradients add up to that of the global batch
    for any topology. DeepSpeed averages over ranks, so the loss is multiplied by their number.
    """
    model, strategy, accumulator = context.engine.module, context.strategy, MetricAccumulator()
    with context.clock("teacher"):
        teacher_outputs = context.backend.score(microbatches)
    with context.clock("student"):
        for batch, outputs in zip(microbatches, teacher_outputs):
            context.world.trace.heartbeat()
            strength_N = strategy.strength(progress, batch.rate)
            hidden_LH = masked_hidden_states(model, batch.student)
            scores = strategy.score(hidden_LH, model.head_weight, batch, outputs, strength_N)
            logprobs, level = scores.target_logprobs, batch.student_level
            if batch.gold is not None:
                logprobs, level = logprobs[batch.gold], level[batch.gold]
            denoise = denoise_loss(logprobs, batch.inverse_weight[level], counts.maskable)
            next_token = next_token_loss(scores.next_logprobs, counts.next_tokens)
            distill, metrics = strategy.loss(scores, outputs, batch, strength_N, counts)
            loss = denoise + next_token + strategy.distill_weight * distill
            context.engine.backward(loss * context.world.size, scale_wrt_gas=False)
            context.engine.step()
            accumulator.forwards.append(loss.detach())
            losses = {"total": loss, "denoise": denoise, "next_token": next_token, "distill": distill}
            accumulator.add_losses({f"loss/{name}": losses[name] for name in strategy.losses})
            accumulator.add(metrics)
            accumulator.add(denoise_metrics(logprobs.detach(), batch.rate[level]))
    return accumulator


def global_counts(microbatches: Sequence[DistillBatch], world: DistContext, stop_asked: bool) -> tuple[Counts, bool]:
    """The step's denominators over all ranks, and whether any rank got a stop signal: one collective, on the CPU."""
    local = [
        sum(batch.maskable for batch in microbatches),
        sum(len(batch.chunk_level) for batch in microbatches),
        sum(len(batch.pair_chunk) for batch in microbatches),
        sum(len(batch.next_targets) for batch in microbatches),
        float(stop_asked),
    ]
    maskable, chunks, pairs, next_tokens, stops = world.sum_over_ranks(local)
    return Counts(maskable=maskable, chunks=chunks, pairs=pairs, next_tokens=next_tokens), stops > 0


def to_device(microbatches: Sequence[DistillBatch], device: torch.device) -> list[DistillBatch]:
    """Copies that do not wait: page-locked memory is kept until they are done."""
    return [batch.to(device, non_blocking=True) for batch in microbatches]
