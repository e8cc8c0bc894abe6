"""One optimizer step: noised window -> teacher's numbers -> student's rows -> loss -> update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tide.clock import Clock
from megatron_tide.diffusion import Noised
from megatron_tide.models import masked_rows
from megatron_tide.objectives import Counts, Strategy, denoise_loss
from megatron_tide.train.metrics import Sums, denoise_metrics
from megatron_tide.train.world import World


@dataclass(frozen=True)
class Parts:
    """What a step works with: all of it built once."""

    engine: Any  # DeepSpeed's
    host: Any  # where the teacher lives
    strategy: Strategy
    world: World
    clock: Clock


def train_step(parts: Parts, window: Sequence[Noised], counts: Counts, progress: float) -> Sums:
    """Take one optimizer step over this rank's micro-batches; sums and counts of every metric, still on the device.

    Losses are local sums over ``counts``, which are global: the ranks' gradients add up to that of the global batch
    whatever the topology. DeepSpeed averages over ranks, so the loss is multiplied by their number.
    """
    model, strategy, sums = parts.engine.module, parts.strategy, Sums()
    with parts.clock("teacher"):
        answers = parts.host.score(window)
    with parts.clock("student"):
        for noised, answer in zip(window, answers):
            parts.world.trace.moved()
            strength_B = strategy.strength(progress, noised.t)
            hidden_MH = masked_rows(model, noised.student)
            scores = strategy.score(hidden_MH, model.head_weight, noised, answer, strength_B)
            t_M = noised.t[noised.student_sample]
            denoise = denoise_loss(scores.gold_logp, t_M, counts.maskable)
            distill, metrics = strategy.loss(scores, answer, noised, strength_B, counts)
            loss = denoise + strategy.distill_weight * distill
            parts.engine.backward(loss * parts.world.size, scale_wrt_gas=False)
            parts.engine.step()
            sums.forwards.append(loss.detach())
            sums.add_loss("loss/total", loss)
            sums.add_loss("loss/denoise", denoise)
            sums.add_loss("loss/distill", distill)
            sums.add(metrics)
            sums.add(denoise_metrics(scores.gold_logp.detach(), t_M))
    return sums


def global_counts(window: Sequence[Noised], world: World, stop_asked: bool) -> tuple[Counts, bool]:
    """The window's denominators over all ranks, and whether any rank was asked to stop: one collective, on the host."""
    local = [
        sum(noised.maskable for noised in window),
        sum(len(noised.chunk_sample) for noised in window),
        sum(len(noised.pair_chunk) for noised in window),
        float(stop_asked),
    ]
    maskable, chunks, pairs, stops = world.sum_over_ranks(local)
    return Counts(maskable=maskable, chunks=chunks, pairs=pairs), stops > 0


def to_device(window: Sequence[Noised], device: torch.device) -> list[Noised]:
    return [noised.to(device) for noised in window]
