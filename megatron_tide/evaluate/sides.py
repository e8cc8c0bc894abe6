"""Either half of prepared data as a question to a model: what it is shown, and which of its masked tokens count.

Scored are the tokens of content chunks and the end chunk (the first end of text). The fill behind it is masked as in
training and never scored, nor are tokens that no chunk covers. Data without a teacher has no chunks: every response
token up to the first end of text is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tide.data import PreparedData
from megatron_tide.data.batch import Batch, Tokens
from megatron_tide.diffusion import ATTENTION_LAYOUTS, AttentionLayout, ModelInput, Noise


@dataclass(frozen=True)
class Side:
    """Whose tokens are scored and how they are shown to the model. Made by ``student_side`` and ``teacher_side``."""

    name: str
    tokens: Callable[[Batch], Tokens]
    masked: Callable[[Noise], torch.Tensor]
    context: AttentionLayout
    block: int
    mask_id: int
    lengths: NDArray[np.int32]
    needs_chunks: bool


@dataclass(frozen=True)
class Question:
    """One forward's worth: the input, and for each of its rows the token to guess and the sample it belongs to."""

    inputs: ModelInput
    gold: torch.Tensor
    sample: torch.Tensor


def student_side(data: PreparedData, context: str = "staircase") -> Side:
    """The student's half of ``data``, with the block size that it was prepared for."""
    manifest = data.manifest["student"]
    return Side(
        name="student",
        tokens=lambda batch: batch.student,
        masked=lambda drawn: drawn.student_masked,
        context=_context(context),
        block=manifest["block"],
        mask_id=manifest["mask_id"],
        lengths=data.stats.student_length,
        needs_chunks=not data.student_only,
    )


def teacher_side(data: PreparedData, context: str = "staircase") -> Side:
    """The teacher's half of two-sided ``data``; the staircase lets it see what the student sees.

    Raises:
        ValueError: when the data has no teacher's half, or the context is unknown.
    """
    if data.student_only:
        raise ValueError(f"{data.folder}: prepared without a teacher, so it cannot score one; prepare it with --bridge")
    manifest = data.manifest["teacher"]
    return Side(
        name="teacher",
        tokens=_teacher_tokens,
        masked=_teacher_masked,
        context=_context(context),
        block=manifest["block"],
        mask_id=manifest["mask_id"],
        lengths=data.stats.teacher_length,
        needs_chunks=True,
    )


def _teacher_tokens(batch: Batch) -> Tokens:
    assert batch.teacher is not None
    return batch.teacher


def _teacher_masked(drawn: Noise) -> torch.Tensor:
    assert drawn.teacher_masked is not None
    return drawn.teacher_masked


def _context(name: str) -> AttentionLayout:
    if name not in ATTENTION_LAYOUTS:
        raise ValueError(f"context {name!r}: choose one of {', '.join(sorted(ATTENTION_LAYOUTS))}")
    return ATTENTION_LAYOUTS[name]


def ask(side: Side, batch: Batch, drawn: Noise) -> Question:
    """The masked tokens of ``batch`` that count for the bound."""
    tokens, masked_BS = side.tokens(batch), side.masked(drawn)
    position_S = torch.arange(tokens.ids.shape[1])
    scored_BS = (position_S >= tokens.prompt.unsqueeze(1)) & (position_S <= tokens.content_end.unsqueeze(1))
    if side.needs_chunks:
        scored_BS = scored_BS & (tokens.chunk >= 0)
    sample_M, position_M = (masked_BS & scored_BS).nonzero(as_tuple=True)
    inputs = side.context(tokens, masked_BS, sample_M, position_M, block=side.block, mask_id=side.mask_id)
    return Question(inputs, tokens.ids[sample_M, position_M], sample_M)
