"""Distribution objectives: a full distribution per row, where a chunk is one token of both student and teacher.

Rows are compared in "categories": the strings in both vocabularies (``VocabMap``) and, where the tokenizers
differ, one bucket for the rest of each side's mass. A category's score is a logit at temperature T, so the objectives
below are plain softmax divergences and do not know whether two tokenizers are equal.

Shapes: m rows, V_s and V_t vocabularies, D categories (K mapped strings, plus one with a bucket).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class DistributionObjective:
    """``rows(student_logp [m, D], target_logp [m, D])`` -> [m]. ``reversed``: the student's mass weights the logs."""

    name: str
    rows: Callable[[Tensor, Tensor], Tensor]
    reversed: bool


def forward_kl(student_logp_mD: Tensor, target_logp_mD: Tensor) -> Tensor:
    """KL(target || student) per row, from log-probs."""
    return (target_logp_mD.exp() * (target_logp_mD - student_logp_mD)).sum(-1)


def reverse_kl(student_logp_mD: Tensor, target_logp_mD: Tensor) -> Tensor:
    """KL(student || target) per row, from log-probs."""
    return (student_logp_mD.exp() * (student_logp_mD - target_logp_mD)).sum(-1)


FORWARD_KL = DistributionObjective("forward_kl", forward_kl, reversed=False)
REVERSE_KL = DistributionObjective("reverse_kl", reverse_kl, reversed=True)


class _Columns(NamedTuple):
    """Columns of one side's mapped ids and of the rest of its vocabulary; a slice if the ids are 0, 1, 2, ..."""

    mapped: slice | Tensor
    rest: slice | Tensor


class _Side:
    """One side of a vocabulary map: ids [K] int64, and their columns per device and vocabulary width, made once."""

    def __init__(self, ids_K: Tensor, name: str) -> None:
        assert ids_K.unique().numel() == ids_K.numel(), f"the vocabulary map has one of the {name}'s ids twice"
        self._ids = ids_K
        self._name = name
        self._top = int(ids_K.max())
        self._is_prefix = self._top + 1 == ids_K.numel() and bool((ids_K.diff() > 0).all())
        self._columns: dict[tuple[torch.device, int], _Columns] = {}

    def columns(self, logits_mV: Tensor) -> _Columns:
        device, width = logits_mV.device, logits_mV.shape[-1]
        if (device, width) not in self._columns:
            self._columns[device, width] = self._place(device, width)
        return self._columns[device, width]

    def _place(self, device: torch.device, width: int) -> _Columns:
        if self._top >= width:
            raise ValueError(
                f"the {self._name}'s head has {width} outputs, but the bridge has its token {self._top}; "
                f"use the tokenizer that the {self._name} was trained with, and build the bridge from it"
            )
        if self._is_prefix:
            return _Columns(slice(0, self._top + 1), slice(self._top + 1, width))
        is_rest = torch.ones(width, dtype=torch.bool).index_fill(0, self._ids, False)
        return _Columns(self._ids.to(device), is_rest.nonzero().squeeze(1).to(device))


class VocabMap:
    """Pairs of student and teacher ids with the same bytes, which define the compared categories.

    ``student_ids``, ``teacher_ids`` int64 [K]: pairs, no id twice on a side. ``bucket``: add one category for the mass
    of all the ids that are not mapped; without it both sides are renormalised over the mapped ids.
    """

    def __init__(self, student_ids: Tensor, teacher_ids: Tensor, bucket: bool) -> None:
        assert student_ids.shape == teacher_ids.shape
        if student_ids.numel() == 0:
            raise ValueError(
                "the two tokenizers share no token, so no distribution can be compared; use a chunk objective"
            )
        self.strings = student_ids.numel()
        self.bucket = bucket
        self._student = _Side(student_ids, "student")
        self._teacher = _Side(teacher_ids, "teacher")

    @classmethod
    def shared_prefix(cls, size: int) -> VocabMap:
        """Ids 0 to size - 1 mean the same on both sides: the plain divergence over that prefix."""
        return cls(torch.arange(size), torch.arange(size), bucket=False)

    def of_student(self, logits_mV: Tensor, teacher_width: int, temperature: float) -> Tensor:
        """The student's logits [m, D] over the compared categories, divided by T; ``teacher_width``: the number of the
        teacher's logits.

        The bucket's logit is the logsumexp of its logits / T: softmax over the D categories then gives every mapped id
        the probability it has among all V, and the bucket exactly the rest, however small. If all ids of a side are
        mapped, it has no rest, and there is no bucket on either side.
        """
        with_bucket = self.bucket and self.strings < min(logits_mV.shape[-1], teacher_width)
        return _over_categories(logits_mV, self._student.columns(logits_mV), temperature, with_bucket)

    def of_teacher(self, logits_mV: Tensor, student_width: int, temperature: float) -> Tensor:
        """The same of the teacher, in the same order; ``student_width``: the number of the student's logits."""
        with_bucket = self.bucket and self.strings < min(logits_mV.shape[-1], student_width)
        return _over_categories(logits_mV, self._teacher.columns(logits_mV), temperature, with_bucket)


def most_likely(scores_mD: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(log-probs [m, count + 1] of a row's ``count`` largest categories and of the others together, which [m, count]).

    A divergence over these is a lower bound of the one over all D > ``count`` categories, and still a divergence.
    """
    logp_mD = torch.log_softmax(scores_mD, dim=-1)
    top_mk = logp_mD.topk(count, dim=-1).indices
    return coarsened(logp_mD, top_mk), top_mk


def coarsened(scores_mD: Tensor, top_mk: Tensor) -> Tensor:
    """Scores [m, k + 1]: those of the categories ``top_mk``, and the logsumexp of the others."""
    rest_m1 = scores_mD.scatter(1, top_mk, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([scores_mD.gather(1, top_mk), rest_m1], dim=-1)


def _over_categories(logits_mV: Tensor, columns: _Columns, temperature: float, with_bucket: bool) -> Tensor:
    mapped_mK = _take(logits_mV, columns.mapped) / temperature
    if not with_bucket:
        return mapped_mK
    rest_m1 = torch.logsumexp(_take(logits_mV, columns.rest) / temperature, dim=-1, keepdim=True)
    return torch.cat([mapped_mK, rest_m1], dim=-1)


def _take(logits_mV: Tensor, columns: slice | Tensor) -> Tensor:
    if isinstance(columns, slice):
        return logits_mV[:, columns]  # a view: a shared vocabulary needs no gather
    return logits_mV.index_select(1, columns)


class _Segments(NamedTuple):
    """The outputs of the teacher's head, by category: their order, the category of each, and how many it has."""

    order_V: Tensor
    category_V: Tensor
    lengths_D: Tensor
    reached_V: Tensor
    whole_V: Tensor


class PrefixMap:
    """Categories of what comes next, where a token of one side is several of the other's: byte prefixes.

    At the first row of any chunk both sides predict the same next bytes. Each of the teacher's tokens gives its mass to
    the student's token of its bytes, else to the longest one that its bytes begin with: ``prefix_ids`` int64 [V_t], -1
    for none. A category is a student id that is reached (from one or more of the teacher's), and one bucket has the
    rest of both sides. It has the methods of ``VocabMap``, which is more exact where a chunk is one token on each side.
    ``whole_ids`` int64 [K]: the teacher's ids that are a student token themselves.
    """

    def __init__(self, prefix_ids: Tensor, whole_ids: Tensor) -> None:
        self._prefix_ids, self._whole_ids = prefix_ids, whole_ids
        self._reached = prefix_ids[prefix_ids >= 0].unique()
        if self._reached.numel() == 0:
            raise ValueError("no token of the teacher begins with one of the student; use a chunk objective")
        self.strings, self.bucket = self._reached.numel(), True
        self._student = _Side(self._reached, "student")
        self._some_unreached = bool((prefix_ids < 0).any())
        self._segments: dict[tuple[torch.device, int], _Segments] = {}

    def of_student(self, logits_mV: Tensor, teacher_width: int, temperature: float) -> Tensor:
        """As ``VocabMap.of_student``."""
        with_bucket = self._has_rest(teacher_width) and self.strings < logits_mV.shape[-1]
        return _over_categories(logits_mV, self._student.columns(logits_mV), temperature, with_bucket)

    def of_teacher(self, logits_mV: Tensor, student_width: int, temperature: float) -> Tensor:
        """As ``VocabMap.of_teacher``: the logsumexp of the logits / T of all ids that reach a category.

        A softmax then gives each the sum of the probabilities of its ids, however small. No gradient; sums are in a
        fixed order on every device.
        """
        by = self._by_category(logits_mV)
        sorted_Vm = (logits_mV.detach() / temperature).index_select(1, by.order_V).T.contiguous()
        top_Dm = torch.segment_reduce(sorted_Vm, "max", lengths=by.lengths_D, axis=0, unsafe=True)
        shares_Vm = (sorted_Vm - top_Dm.index_select(0, by.category_V)).exp()
        sums_Dm = torch.segment_reduce(shares_Vm, "sum", lengths=by.lengths_D, axis=0, unsafe=True)
        scores_mD = (top_Dm + sums_Dm.log()).T
        return scores_mD if self.strings < student_width else scores_mD[:, : self.strings]

    def spelled(self, logits_mV: Tensor) -> tuple[Tensor, Tensor]:
        """[m] each: the teacher's mass on strings that are a student token, and on those that only begin with one."""
        by, probability_mV = self._by_category(logits_mV), logits_mV.softmax(-1)
        whole_m = (probability_mV * by.whole_V).sum(-1)
        return whole_m, (probability_mV * (by.reached_V & ~by.whole_V)).sum(-1)

    def _has_rest(self, teacher_width: int) -> bool:
        return self._some_unreached or teacher_width > len(self._prefix_ids)

    def _by_category(self, logits_mV: Tensor) -> _Segments:
        """For the teacher's head, which may be wider than the table; made once."""
        device, width = logits_mV.device, logits_mV.shape[-1]
        if (device, width) not in self._segments:
            used, beyond = self._prefix_ids[:width], self._prefix_ids[width:]
            if bool((beyond >= 0).any()):
                raise ValueError(
                    f"the teacher's head has {width} outputs, the bridge has {len(self._prefix_ids)} of its tokens; "
                    "use the tokenizer that the teacher was trained with, and build the bridge from it"
                )
            category_V = torch.full((width,), self.strings)
            category_V[: len(used)] = torch.where(used >= 0, torch.searchsorted(self._reached, used), self.strings)
            order_V = category_V.argsort(stable=True)
            lengths_D = torch.bincount(category_V, minlength=self.strings)
            whole_V = torch.zeros(width, dtype=torch.bool).index_fill(0, self._whole_ids, True)
            parts = order_V, category_V[order_V], lengths_D, category_V < self.strings, whole_V
            self._segments[device, width] = _Segments(*(part.to(device) for part in parts))
        return self._segments[device, width]
