"""Micro-batches made by hand, and the strategies' loss from full logits, one chunk at a time.

A sample is a timestep, its chunks as (student tokens, teacher tokens), and how many masked student tokens are in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_tide.diffusion import DistillBatch
from megatron_tide.objectives import Counts, TeacherOutputs
from tests.reference import chunk as chunk_reference
from tests.reference import denoise as denoise_reference
from tests.reference import distribution as distribution_reference
from tests.reference import tidal as tidal_reference

STUDENT_VOCAB, TEACHER_VOCAB, STUDENT_WIDTH, TEACHER_WIDTH = 13, 16, 6, 5
SHARED = SimpleNamespace(shared=True, shared_prefix=11, student_ids=np.arange(11), teacher_ids=np.arange(11))
MAPPED = SimpleNamespace(
    shared=False,
    shared_prefix=2,
    student_ids=np.array([0, 1, 4, 6, 7, 9, 12]),
    teacher_ids=np.array([0, 1, 15, 3, 2, 8, 10]),
)


@dataclass(frozen=True)
class Sample:
    t: float
    chunks: tuple[tuple[int, int], ...]
    loose: int
    maskable: int
    seed: int


SAMPLES = (
    Sample(t=0.35, chunks=((1, 1), (2, 1), (1, 3)), loose=2, maskable=11, seed=1),
    Sample(t=0.9, chunks=((1, 1), (1, 1)), loose=0, maskable=4, seed=2),
    Sample(t=0.6, chunks=((3, 2), (1, 1), (1, 2), (1, 1)), loose=1, maskable=14, seed=3),
)
LOOSE_ONLY = (Sample(t=0.5, chunks=(), loose=3, maskable=5, seed=4),)
NOTHING = (Sample(t=0.01, chunks=(), loose=0, maskable=5, seed=5),)


@dataclass(frozen=True)
class MicroBatch:
    noised: DistillBatch
    hidden_MH: torch.Tensor
    teacher_RH: torch.Tensor

    @property
    def local_counts(self) -> Counts:
        noised = self.noised
        return Counts(maskable=noised.maskable, chunks=len(noised.chunk_level), pairs=len(noised.pair_chunk))


@dataclass(frozen=True)
class Heads:
    student_VH: torch.Tensor
    teacher_VH: torch.Tensor


def heads() -> Heads:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(STUDENT_VOCAB, STUDENT_WIDTH, dtype=torch.float64, generator=generator)
    teacher = torch.randn(TEACHER_VOCAB, TEACHER_WIDTH, dtype=torch.float64, generator=generator)
    return Heads(student.requires_grad_(), teacher)


def micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    """The rows of ``samples``, in order; what a sample draws depends on its own seed alone."""
    out: dict[str, list[Any]] = {name: [] for name in ("sample", "chunk", "gold", "t_chunk", "t_gold", "chunk_level")}
    pairs: list[tuple[int, int, int]] = []
    hidden, teacher = [], []
    for b, sample in enumerate(samples):
        generator = torch.Generator().manual_seed(sample.seed)
        for student_tokens, teacher_tokens in sample.chunks:
            k = len(out["chunk_level"])
            if (student_tokens, teacher_tokens) == (1, 1):
                pairs.append((len(out["chunk"]), len(out["t_chunk"]), k))
            out["chunk_level"].append(b)
            out["chunk"] += [k] * student_tokens
            out["t_chunk"] += [k] * teacher_tokens
        out["chunk"] += [-1] * sample.loose
        rows, teacher_rows = (sum(side) for side in zip((sample.loose, 0), *sample.chunks))
        out["sample"] += [b] * rows
        out["gold"] += torch.randint(STUDENT_VOCAB, (rows,), generator=generator).tolist()
        out["t_gold"] += torch.randint(TEACHER_VOCAB, (teacher_rows,), generator=generator).tolist()
        hidden.append(torch.randn(rows, STUDENT_WIDTH, dtype=torch.float64, generator=generator))
        teacher.append(torch.randn(teacher_rows, TEACHER_WIDTH, dtype=torch.float64, generator=generator))
    index = {name: torch.tensor(values, dtype=torch.long) for name, values in out.items()}
    pair_PP = torch.tensor(pairs, dtype=torch.long).reshape(-1, 3)
    noised = DistillBatch(
        rate=torch.tensor([sample.t for sample in samples], dtype=torch.float64),
        inverse_weight=torch.tensor([sample.t / 2 for sample in samples], dtype=torch.float64),  # another than the rate
        student=None,  # type: ignore[arg-type]  # objectives read rows, never the models' inputs
        student_targets=index["gold"],
        student_level=index["sample"],
        student_chunk=index["chunk"],
        next_targets=index["gold"][:0],
        teacher=None,
        teacher_targets=index["t_gold"],
        teacher_chunk=index["t_chunk"],
        chunk_level=index["chunk_level"],
        pair_student_index=pair_PP[:, 0],
        pair_teacher_index=pair_PP[:, 1],
        pair_chunk=pair_PP[:, 2],
        maskable=sum(sample.maskable for sample in samples),
    )
    return MicroBatch(noised, torch.cat(hidden).requires_grad_(), torch.cat(teacher))


def answer(batch: MicroBatch, weights: Heads, strategy: Any) -> TeacherOutputs:
    """What a teacher with these hidden rows would say."""
    logits = batch.teacher_RH @ weights.teacher_VH.T
    gold = logits.log_softmax(-1).gather(1, batch.noised.teacher_targets[:, None]).squeeze(1)
    hidden = batch.teacher_RH[batch.noised.pair_teacher_index]
    return TeacherOutputs(
        target_logprobs=gold if strategy.needs_target_logprobs else None,
        hidden=hidden if strategy.needs_hidden else None,
        head_weight=weights.teacher_VH if strategy.needs_hidden else None,
    )


@dataclass(frozen=True)
class Expectation:
    """A strategy in words, for the reference: nothing of the package's tables is used."""

    chunk: str = "none"
    rows: str = "none"
    chunk_tidal: str = "off"
    rows_tidal: str = "off"
    temperature: float = 2.0
    midrange: bool = False
    axes: str = "both"
    ramp: str = "cosine"


def reference_losses(
    batch: MicroBatch, weights: Heads, want: Expectation, bridge: Any, progress: float, counts: Counts
) -> tuple[torch.Tensor, torch.Tensor]:
    """(denoising loss, distillation loss) with loops over tokens, chunks and categories of full logits."""
    noised, T = batch.noised, want.temperature
    student_MV, teacher_RV = batch.hidden_MH @ weights.student_VH.T, batch.teacher_RH @ weights.teacher_VH.T
    gold = [
        distribution_reference.probabilities(row, 1.0)[g].log() for row, g in zip(student_MV, noised.student_targets)
    ]
    t_gold = [
        distribution_reference.probabilities(row, 1.0)[g].log() for row, g in zip(teacher_RV, noised.teacher_targets)
    ]
    denoise = denoise_reference.denoise(
        gold, [noised.inverse_weight[b].item() for b in noised.student_level], int(max(counts.maskable, 1))
    )
    total = torch.zeros((), dtype=torch.float64)
    for k, b in enumerate(noised.chunk_level.tolist()):
        t = noised.rate[b].item()
        strength = tidal_reference.strength(progress, t, 0.1, 0.9, want.ramp, want.axes)
        weight = tidal_reference.midrange(t) if want.midrange else 1.0
        student_rows = [m for m, c in enumerate(noised.student_chunk.tolist()) if c == k]
        teacher_rows = [r for r, c in enumerate(noised.teacher_chunk.tolist()) if c == k]
        if want.rows != "none" and len(student_rows) == len(teacher_rows) == 1:
            sides = student_MV[student_rows[0]], teacher_RV[teacher_rows[0]]
            weight *= strength if want.rows_tidal == "weight" else 1.0
            total = total + weight * T**2 * _row_term(*sides, want, bridge, strength)
        elif want.chunk != "none":
            lp_s, lp_t = sum(gold[m] for m in student_rows), sum(t_gold[r] for r in teacher_rows)
            target = chunk_reference.teacher_target(lp_t, T)
            if want.chunk_tidal == "mix":
                target = chunk_reference.mixed_target(lp_s, lp_t, T, strength)
            weight *= strength if want.chunk_tidal == "weight" else 1.0
            total = total + weight * chunk_reference.TERMS[want.chunk](chunk_reference.probability(lp_s, T), *target)
    count = counts.pairs if want.chunk == "none" else counts.chunks
    return torch.as_tensor(denoise), total / max(count, 1)


def _row_term(
    student_V: torch.Tensor, teacher_V: torch.Tensor, want: Expectation, bridge: Any, strength: float
) -> torch.Tensor:
    bucket = not bridge.shared
    student_ids, teacher_ids = (
        (range(bridge.shared_prefix),) * 2 if bridge.shared else (bridge.student_ids, bridge.teacher_ids)
    )
    student = distribution_reference.categories(student_V, want.temperature, student_ids, bucket)
    target = distribution_reference.categories(teacher_V, want.temperature, teacher_ids, bucket)
    if want.rows_tidal == "mix":
        target = tidal_reference.mixed(student, target, strength)
    return distribution_reference.DIVERGENCES[want.rows](student, [p.detach() for p in target])
