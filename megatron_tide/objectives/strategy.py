"""A strategy: the objectives that use the teacher, with their settings; built once from its name
(``table.build_strategy``).

A training step uses three methods, in order: ``strength`` (TIDAL's lambda per noise level), ``score`` (the student's
head on its scored positions: one number per position, never [B, S, V]) and ``loss`` (a local sum over global counts).
None of them synchronises with the device.

Shapes: N noise levels (see ``diffusion.masking.Noise``), M masked student rows, Q next-token rows, R scored teacher
tokens, K active chunks, P pairs (one-to-one chunks), V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tide.diffusion import CompDemo, DistillBatch, Masking, NoiseSampling, NoiseSchedule, StudentLayout
from megatron_tide.models.head import score_rows, target_logprobs
from megatron_tide.objectives.chunk import ChunkObjective, chunk_logp, student_bernoulli, teacher_bernoulli
from megatron_tide.objectives.common import Metrics, at_least_fp32, mean_over, means_by_bin, shares_by_bin
from megatron_tide.objectives.distribution import DistributionObjective, PrefixMap, VocabMap, coarsened, most_likely
from megatron_tide.objectives.outputs import Counts, StudentScores, TeacherOutputs
from megatron_tide.objectives.tidal import TidalUse, midrange_weight, tidal_strength

SPELLED = ("one_token_mass", "several_tokens_mass")  # of the teacher, by how the student spells its tokens


@dataclass(frozen=True)
class TidalCurve:
    """lambda(progress, masking rate), and the optional midrange weight."""

    init: float
    peak: float
    ramp: str
    axes: str
    midrange: bool

    def strength(self, progress: float, rate_N: Tensor) -> Tensor:
        return tidal_strength(progress, rate_N, self.init, self.peak, self.ramp, self.axes)

    def level_weight(self, rate_N: Tensor) -> Tensor:
        return midrange_weight(rate_N) if self.midrange else torch.ones_like(rate_N)


@dataclass(frozen=True)
class ChunkTerm:
    """A chunk objective at temperature T, with its use of TIDAL."""

    objective: ChunkObjective
    tidal: TidalUse
    temperature: float

    def chunks(self, student_lp_K: Tensor, teacher_lp_K: Tensor, strength_K: Tensor) -> Tensor:
        """Loss per chunk [K], unweighted."""
        student = student_bernoulli(student_lp_K, self.temperature)
        teacher = teacher_bernoulli(teacher_lp_K, self.temperature)
        return self.objective.term(student, self.tidal.chunks(student, teacher, strength_K))


@dataclass(frozen=True)
class DistributionTerm:
    """A distribution objective at temperature T over a vocabulary map, with its use of TIDAL.

    ``top``: how many of the teacher's most likely categories are compared singly, the others as one; 0: all.
    """

    objective: DistributionObjective
    tidal: TidalUse
    temperature: float
    vocabulary: VocabMap | PrefixMap
    top: int = 0

    def target(self, teacher_mV: Tensor, student_width: int) -> tuple[Tensor, ...]:
        """The teacher's scores [m, D] over the compared categories, and with fewer than all which [m, D - 1]."""
        scores_mD = self.vocabulary.of_teacher(teacher_mV, student_width, self.temperature)
        return most_likely(scores_mD, self.top) if 0 < self.top < scores_mD.shape[-1] else (scores_mD,)

    def rows(
        self, student_mV: Tensor, teacher_width: int, strength_m: Tensor, teacher_mD: Tensor, *top_mk: Tensor
    ) -> Tensor:
        """T^2 times the divergence per row [m], unweighted, from the student's logits and the teacher's ``target``
        (which may be followed by columns without meaning).
        """
        student_mD = self.vocabulary.of_student(student_mV, teacher_width, self.temperature)
        student_mD = coarsened(student_mD, *top_mk) if top_mk else student_mD
        target_mD = self.tidal.rows(student_mD, teacher_mD[:, : student_mD.shape[-1]], strength_m)
        return self.temperature**2 * self.objective.rows(torch.log_softmax(student_mD, dim=-1), target_mD)


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A distillation loss with its settings, and the student's own losses (``student``).

    ``chunk`` scores chunks by their target tokens, ``rows`` compares full distributions on pairs. With both, each
    active chunk is counted once: pairs use the distribution term, the others the chunk term. With ``first_rows`` the
    first row of each of the others is compared too, over byte prefixes, and the distribution terms are weighted as
    denoising is: by 1 / masking rate, over all maskable tokens.
    """

    name: str
    student: StudentLayout
    chunk: ChunkTerm | None
    rows: DistributionTerm | None
    curve: TidalCurve
    compdemo: CompDemo | None
    noise_schedule: NoiseSchedule
    noise_sampling: NoiseSampling
    masking: Masking
    distill_weight: float
    provenance: dict[str, Any]
    first_rows: DistributionTerm | None = None

    @property
    def needs_target_logprobs(self) -> bool:
        """Whether the teacher's target log-probs [R] are needed."""
        return self.chunk is not None

    @property
    def needs_hidden(self) -> bool:
        """Whether the teacher's hidden states at pairs [P, H_t] are needed."""
        return self.rows is not None

    @property
    def needs_teacher(self) -> bool:
        return self.needs_target_logprobs or self.needs_hidden

    @property
    def losses(self) -> list[str]:
        """Names of the losses to log: the total and its parts, without those of the student's own that it has not."""
        own = {"denoise": self.student.denoise, "next_token": self.student.next_token}
        return ["total", *(name for name, computed in own.items() if computed), "distill"]

    def describe(self) -> dict[str, Any]:
        """What was built, in plain values: for run.json and the model card."""
        return dict(self.provenance)

    def strength(self, progress: float, rate_N: Tensor) -> Tensor:
        """lambda [N] for the noise levels' masking rates; ``progress``: step / total steps, in [0, 1]."""
        return self.curve.strength(progress, rate_N)

    def score(
        self,
        hidden_LH: Tensor,
        head_weight_VH: Tensor,
        batch: DistillBatch,
        teacher: TeacherOutputs,
        strength_N: Tensor,
        slice_rows: int | None = None,
    ) -> StudentScores:
        """Run the student's head once over its L = M + Q rows; pairs get their divergence in the same pass.

        ``slice_rows``: number of rows of logits at once; None: chosen by the head.
        """
        targets_L = torch.cat([batch.student_targets, batch.next_targets])
        spelled: tuple[Tensor, ...] = ()
        if self.rows is None:
            logprobs_L = target_logprobs(hidden_LH, head_weight_VH, targets_L, slice_rows)
            divergence_P = covered_P = None
        else:
            pairs_P, others_O = batch.pair_student_index, _complement(batch.pair_student_index, hidden_LH.shape[0])
            strength_P, columns = strength_N[batch.chunk_level[batch.pair_chunk]], []
            terms = self.terms(batch)
            for term, index in terms:
                rows = pairs_P[index]
                pair_args = targets_L[rows], strength_P[index], *(part[index] for part in teacher.of_pairs)
                pair_fn = _PairScores(term, teacher, self.first_rows)
                columns.append(score_rows(pair_fn, hidden_LH[rows], head_weight_VH, pair_args, slice_rows))
            of_pairs_P, divergence_P, *more = _in_place(columns, [index for _, index in terms])
            if self.first_rows is None:
                covered_P = more[0] if more else None
            else:
                covered_P, spelled = None, tuple(more)
            of_others_O = target_logprobs(hidden_LH[others_O], head_weight_VH, targets_L[others_O], slice_rows)
            logprobs_L = torch.cat([of_pairs_P, of_others_O])
            logprobs_L = torch.zeros_like(logprobs_L).index_copy(0, torch.cat([pairs_P, others_O]), logprobs_L)
        logprobs_M, next_logprobs_Q = logprobs_L.split([len(batch.student_targets), len(batch.next_targets)])
        return StudentScores(logprobs_M, next_logprobs_Q, divergence_P, covered_P, spelled)

    def terms(self, batch: DistillBatch) -> list[tuple[DistributionTerm, Tensor | slice]]:
        """The distribution terms, with the pairs that they compare: one-to-one chunks, and first rows of the others."""
        assert self.rows is not None
        if self.first_rows is None or batch.pair_several is None:
            return [(self.rows, slice(None))]
        single = _complement(batch.pair_several, batch.pair_chunk.numel())
        return [(self.rows, single), (self.first_rows, batch.pair_several)]

    def loss(
        self, scores: StudentScores, teacher: TeacherOutputs, batch: DistillBatch, strength_N: Tensor, counts: Counts
    ) -> tuple[Tensor, Metrics]:
        """This micro-batch's share of the distillation loss (a scalar), and metrics with a fixed set of names.

        The loss, not yet times ``distill_weight``, is a sum over local chunks and pairs divided by GLOBAL counts: the
        active chunks, or the pairs where only the rows' objective is on (with ``first_rows``: the chunks' part over the
        active chunks, the rows' over the maskable tokens). It is 0 with a graph where there are none.
        """
        total, metrics = scores.target_logprobs.new_zeros(()), self._common_metrics(scores, batch, strength_N)
        weight_N = self.curve.level_weight(batch.rate)
        if self.chunk is not None:
            chunk_total, chunk_metrics = self._chunk_part(self.chunk, scores, teacher, batch, strength_N, weight_N)
            total, metrics = total + chunk_total, metrics | chunk_metrics
        if self.rows is not None:
            assert scores.divergence is not None
            level_P = batch.chunk_level[batch.pair_chunk]
            weight_P = self.rows.tidal.weight(strength_N[level_P]) * weight_N[level_P]
            metrics["distill/kl"] = _summed(scores.divergence)
            metrics |= {} if scores.covered is None else {"distill/covered_mass": _summed(scores.covered)}
            if self.first_rows is not None:
                metrics |= {f"spelled/{name}": _summed(mass) for name, mass in zip(SPELLED, scores.spelled)}
                weight_P = weight_P / batch.inverse_weight[level_P]
                rows_total = (scores.divergence * weight_P.to(scores.divergence.dtype)).sum()
                return mean_over(total, counts.chunks) + mean_over(rows_total, counts.maskable), metrics
            total = total + (scores.divergence * weight_P.to(scores.divergence.dtype)).sum()
        return mean_over(total, counts.pairs if self.chunk is None else counts.chunks), metrics

    def _chunk_part(
        self,
        term: ChunkTerm,
        scores: StudentScores,
        teacher: TeacherOutputs,
        batch: DistillBatch,
        strength_N: Tensor,
        weight_N: Tensor,
    ) -> tuple[Tensor, Metrics]:
        """Sum of the weighted chunk terms, and the chunk statistics (over all active chunks)."""
        assert teacher.target_logprobs is not None
        level_K = batch.chunk_level
        student_lp_K = chunk_logp(scores.target_logprobs, batch.student_chunk, level_K.numel())
        teacher_lp_K = chunk_logp(teacher.target_logprobs, batch.teacher_chunk, level_K.numel())
        term_K = term.chunks(student_lp_K, teacher_lp_K, strength_N[level_K])
        taken_K = torch.ones_like(term_K)
        if self.rows is not None:
            _, single = self.terms(batch)[0]
            taken_K = taken_K.index_fill(0, batch.pair_chunk[single], 0.0)
        weight_K = term.tidal.weight(strength_N[level_K]) * weight_N[level_K]
        break_even = -term.temperature * math.log(2)
        student_p_K = (student_lp_K.detach() / term.temperature).exp()
        teacher_p_K = (teacher_lp_K / term.temperature).exp()
        metrics = {
            "distill/chunk": ((term_K * taken_K).detach().sum(), taken_K.sum()),
            "chunk/student_prob": _summed(student_p_K),
            "chunk/teacher_prob": _summed(teacher_p_K),
            "chunk/below_break_even": _summed((teacher_lp_K < break_even).to(term_K.dtype)),
            # Distribution of the teacher's probabilities, and the student's mean probability in each bin.
            **shares_by_bin("chunk/teacher_probability", teacher_p_K),
            **means_by_bin("chunk/student_probability", teacher_p_K, student_p_K),
        }
        return (term_K * taken_K * weight_K.to(term_K.dtype)).sum(), metrics

    def _common_metrics(self, scores: StudentScores, batch: DistillBatch, strength_N: Tensor) -> Metrics:
        if not self.needs_teacher:
            return {}
        dtype = scores.target_logprobs.dtype
        chunks = scores.target_logprobs.new_full((), batch.chunk_level.numel())
        several = 0 if batch.pair_several is None else batch.pair_several.numel()
        return {
            "chunk/active_share": _summed((batch.student_chunk >= 0).to(dtype)),
            "chunk/pair_share": (torch.full_like(chunks, batch.pair_chunk.numel() - several), chunks),
            "tidal/strength": _summed(strength_N),
        }


class _PairScores:
    """What the head computes from the logits of a slice of pairs: (target log-prob, divergence), each [m], and with
    fewer than all categories the teacher's mass in those that are compared singly; with ``first_rows`` its masses
    ``SPELLED``.

    The teacher's logits of the same rows are computed here from its hidden states, without gradient, if it has them.
    """

    def __init__(self, term: DistributionTerm, teacher: TeacherOutputs, first_rows: DistributionTerm | None) -> None:
        self._term, self._prefixes = term, first_rows.vocabulary if first_rows is not None else None
        self._head_VH = teacher.head_weight
        self._width = teacher.vocab_size if teacher.head_weight is None else len(teacher.head_weight)

    def __call__(
        self, logits_mV: Tensor, targets_m: Tensor, strength_m: Tensor, *teacher: Tensor
    ) -> tuple[Tensor, ...]:
        spelled: tuple[Tensor, ...] = ()
        if self._head_VH is not None:
            with torch.no_grad():
                teacher_mV = at_least_fp32(teacher[0] @ self._head_VH.T)
                teacher = self._term.target(teacher_mV, logits_mV.shape[-1])
                if isinstance(self._prefixes, PrefixMap):
                    spelled = self._prefixes.spelled(teacher_mV)
        target_logit_m = logits_mV.gather(1, targets_m.unsqueeze(1)).squeeze(1)
        divergence_m = self._term.rows(logits_mV, self._width, strength_m, *teacher)
        covered = () if len(teacher) == 1 else (-torch.expm1(teacher[0][:, -1]),)
        return target_logit_m - logits_mV.logsumexp(-1), divergence_m, *covered, *spelled


def _in_place(parts: Sequence[tuple[Tensor, ...]], indices: Sequence[Tensor | slice]) -> list[Tensor]:
    """The columns of ``parts``, joined so that each row stands at its index; a single part has all rows."""
    if len(parts) == 1:
        return list(parts[0])
    place = torch.cat([index for index in indices if isinstance(index, Tensor)])
    return [torch.zeros_like(torch.cat(column)).index_copy(0, place, torch.cat(column)) for column in zip(*parts)]


def _complement(some_P: Tensor, size: int) -> Tensor:
    """The indices below ``size`` that are not in ``some_P``, in order. Their number is known, so there is no
    device synchronisation."""
    is_other = torch.ones(size, dtype=torch.int8, device=some_P.device).index_fill(0, some_P, 0)
    return is_other.argsort(stable=True)[some_P.numel() :]


def _summed(values: Tensor) -> tuple[Tensor, Tensor]:
    total = values.detach().sum()
    return total, torch.full_like(total, values.numel())
