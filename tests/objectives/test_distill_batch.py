"""The strategies on micro-batches that the diffusion package made: aligned samples, noise, CompDemo, row indices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_tide.diffusion import ATTENTION_LAYOUTS, NoiseSampling, TeacherLayout, build_inputs, noise
from tests.diffusion.samples import STUDENT_BLOCK, STUDENT_MASK, TEACHER_BLOCK, TEACHER_MASK, collate, make
from tests.objectives.handmade import (
    STUDENT_VOCAB,
    STUDENT_WIDTH,
    TEACHER_VOCAB,
    TEACHER_WIDTH,
    MicroBatch,
    heads,
    reference_losses,
)
from tests.objectives.test_strategy import CASES, PROGRESS, built, losses

PUBLISHED, PER_BLOCK = NoiseSampling(), NoiseSampling(per_block=True)
T = torch.tensor([[0.5, 0.8, 0.3, 0.9], [0.8, 0.2, 0.7, 0.99], [0.3, 0.6, 0.9, 0.9]])


def real_micro_batch(strategy, sampling=PUBLISHED) -> MicroBatch:
    spans = [(1, 1), (2, 1), (1, 1), (1, 3), (2, 0), (1, 1), (3, 2)]
    batch = collate([make(5, (3, 6), spans), make(6, (2, 0), spans[::-1], ended=False), make(7, (9, 4), [(1, 1)])])
    t = T if sampling.per_block else T[:, 0]
    drawn = noise(batch, seed=3, epoch=0, masking=strategy.masking, sampling=sampling, block=STUDENT_BLOCK, t=t)
    asked = TeacherLayout(ATTENTION_LAYOUTS["full"], TEACHER_BLOCK, TEACHER_MASK, strategy.compdemo)
    teacher = asked if strategy.needs_teacher else None
    noised = build_inputs(batch, drawn, student_block=STUDENT_BLOCK, student_mask_id=STUDENT_MASK, teacher=teacher)
    noised = replace(
        noised,
        rate=noised.rate.double(),
        inverse_weight=noised.inverse_weight.double(),
        student_targets=noised.student_targets % STUDENT_VOCAB,
        teacher_targets=noised.teacher_targets % TEACHER_VOCAB,
    )
    generator = torch.Generator().manual_seed(0)
    sizes = (len(noised.student_targets), STUDENT_WIDTH), (len(noised.teacher_targets), TEACHER_WIDTH)
    hidden, teacher_rows = (torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
    return MicroBatch(noised, hidden.requires_grad_(), teacher_rows)


@pytest.mark.parametrize("sampling", [PUBLISHED, PER_BLOCK], ids=["per sample", "per block"])
@pytest.mark.parametrize("masking", ["expand", "synchronous"])
@pytest.mark.parametrize("case", ["bd3lm", "tide-cross", "kl", "tide-shared, two vocabularies", "tide-bridge"])
def test_rows_chunks_and_pairs_meet(case, masking, sampling):
    switches, bridge, want = CASES[case]
    strategy, weights = built(switches | {"masking": masking}, bridge), heads()
    batch = real_micro_batch(strategy, sampling)
    counts = batch.local_counts
    assert counts.chunks > counts.pairs > 0 or not strategy.needs_teacher
    found = losses(strategy, batch, weights, counts)[:2]
    expected = reference_losses(batch, weights, want, bridge, PROGRESS, counts)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
