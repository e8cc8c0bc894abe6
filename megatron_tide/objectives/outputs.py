"""Inputs of an objective: the teacher's outputs, the student's scores, and the counts that means divide by.

Shape legend: M masked student rows, Q next-token rows, R scored teacher tokens, K active chunks, P one-to-one chunks
("pairs"), V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TeacherOutputs:
    """A frozen teacher's outputs for one micro-batch: numbers or hidden states, never logits.

    ``target_logprobs`` [R]: log-prob of each scored teacher token. ``hidden`` [P, H_t]: the teacher's last hidden state
    at each pair, and ``head_weight`` [V_t, H_t], its head, from which the logits of a few rows at a time are made. A
    field that no objective needs (``Strategy.needs_target_logprobs``, ``Strategy.needs_hidden``) is None. Nothing here
    carries a gradient.

    Instead of ``hidden`` and ``head_weight``, a teacher that was asked before has ``scores`` [P, D], its side of the
    pair's distribution term (``DistributionTerm.target``; D: the most of both terms), and with fewer than all
    categories ``top`` int64 [P, D - 1], which they are; ``vocab_size``: the number of its logits.
    """

    target_logprobs: Tensor | None = None
    hidden: Tensor | None = None
    head_weight: Tensor | None = None
    scores: Tensor | None = None
    top: Tensor | None = None
    vocab_size: int = 0

    @property
    def of_pairs(self) -> tuple[Tensor, ...]:
        """What there is of each pair: hidden states; or scores, and with fewer than all categories which."""
        return tuple(rows for rows in (self.hidden, self.scores, self.top) if rows is not None)


@dataclass(frozen=True)
class StudentScores:
    """``target_logprobs`` [M] of the student's masked tokens; ``next_logprobs`` [Q] of the next tokens; ``divergence``
    [P] per pair (T^2 included) or None; ``covered`` [P]: the teacher's mass in categories that are compared singly;
    ``spelled`` [P] each: its mass on strings that are one of the student's tokens, and on those that are several.
    """

    target_logprobs: Tensor
    next_logprobs: Tensor
    divergence: Tensor | None
    covered: Tensor | None = None
    spelled: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Denominators of the means, summed over all ranks and micro-batches of the step.

    A loss is a local sum over a global count: the curve does not depend on how a batch is spread over ranks.

    ``maskable``: response tokens that could have been masked. ``chunks``: active chunks. ``pairs``: active one-to-one
    chunks. ``next_tokens``: tokens scored as next tokens.
    """

    maskable: float
    chunks: float
    pairs: float
    next_tokens: float = 0.0
