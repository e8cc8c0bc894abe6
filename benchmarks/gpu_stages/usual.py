"""A training step as it is usually written, to compare ours with: not fast, and easy to read.

[xt ; x0] of 2S positions and dense masks; logits of every position of both models, in fp32; the teacher once for each
micro-batch; nothing compiled; optionally a loop over the experts. The loss is ours, from these full logits, so both
ways must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_stages.full import Item, Subject
from benchmarks.hosting import expert_product, loop_over_experts
from megatron_tide.diffusion import staircase_mask
from megatron_tide.models.experts import Experts
from megatron_tide.objectives import Counts, Strategy, TeacherOutputs, denoise_loss
from megatron_tide.objectives.outputs import StudentScores
from megatron_tide.train.step import global_counts


def step(subject: Subject, strategy: Strategy, microbatches: list[Item]) -> dict[str, float]:
    """One optimizer step; -> its losses."""
    inputs = [item.inputs for item in microbatches]
    counts, _ = global_counts(inputs, subject.world, False)
    total = torch.zeros((), device=subject.world.device, dtype=torch.float64)
    with torch.compiler.set_stance("force_eager"):  # compiled layers of the student run as they are written
        for item in microbatches:
            loss = micro_batch_loss(subject, strategy, item, counts)
            subject.engine.backward(loss, scale_wrt_gas=False)
            subject.engine.step()
            total += loss.detach()
    return {"loss/total": float(total)}


def micro_batch_loss(subject: Subject, strategy: Strategy, item: Item, counts: Counts) -> Tensor:
    batch = item.inputs.to(subject.world.device)
    outputs = TeacherOutputs(target_logprobs=teacher_logprobs(subject.teacher, batch))
    strength = strategy.strength(0.5, batch.rate)
    scores = StudentScores(student_logprobs(subject, item, batch), batch.rate.new_empty(0), None)
    denoise = denoise_loss(scores.target_logprobs, batch.inverse_weight[batch.student_level], counts.maskable)
    distill, _ = strategy.loss(scores, outputs, batch, strength, counts)
    return denoise + strategy.distill_weight * distill


@torch.no_grad()
def teacher_logprobs(teacher: Any, batch: Any) -> Tensor:
    """[R], from logits of all positions."""
    asked = batch.teacher
    logits = teacher(asked.input_ids, asked.attention.dense(), asked.position_ids).logits.float()
    rows = logits.log_softmax(-1).flatten(0, 1)[asked.rows]
    return rows.gather(1, batch.teacher_targets[:, None])[:, 0]


def student_logprobs(subject: Subject, item: Item, batch: Any) -> Tensor:
    """[M], from logits of all 2S positions."""
    device, shape = subject.world.device, subject.configs["student"]
    clean, masked = item.batch.student.ids.to(device), item.drawn.student_masked.to(device)
    samples, length = clean.shape
    both = torch.cat((clean.masked_fill(masked, shape["vocab_size"] - 1), clean), 1)
    positions = torch.arange(length, device=device).repeat(2).expand(samples, -1)
    seen = staircase_mask(length, shape["block_size"]).to(device).expand(samples, 1, -1, -1)
    logits = subject.engine.module(both, seen, positions).logits.float()
    rows = logits.log_softmax(-1)[:, :length][masked]
    return rows.gather(1, batch.student_targets[:, None])[:, 0]


def loop_forward(self: Experts, hidden_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """In place of ``Experts.forward``: one expert after the other; the host waits to learn which tokens are whose."""
    return loop_over_experts(expert_product(self))(hidden_TH, index_TK, weight_TK)


@contextmanager
def looped_experts() -> Iterator[None]:
    ours = Experts.forward
    Experts.forward = loop_forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        Experts.forward = ours  # type: ignore[method-assign]
