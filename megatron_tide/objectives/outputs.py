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
    """

    target_logprobs: Tensor | None = None
    hidden: Tensor | None = None
    head_weight: Tensor | None = None


@dataclass(frozen=True)
class StudentScores:
    """``target_logprobs`` [M] of the student's masked tokens; ``next_logprobs`` [Q] of the next tokens; ``divergence``
    [P] per pair (T^2 included) or None.
    """

    target_logprobs: Tensor
    next_logprobs: Tensor
    divergence: Tensor | None


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
