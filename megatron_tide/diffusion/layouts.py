"""Attention layouts: what a model attends to in a sample, and the model input for it.

Shapes: N sequences (the batch, or twice the batch under CompDemo), S positions of the tokens, L positions of the input,
M scored rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_tide.diffusion.attention import BlockDiffusionMask
from megatron_tide.diffusion.tensor_dataclass import TensorDataclass

if TYPE_CHECKING:
    from megatron_tide.data.batch import Tokens
    from megatron_tide.data.prepared import PreparedData


@dataclass(frozen=True)
class ModelInput(TensorDataclass):
    """One forward: input_ids and position_ids int64 [N, L], the attention mask, and rows int64 [M].

    rows: indices into the flattened N * L positions whose predictions are scored, in order. There is no
    right shift: the output at a row predicts that row's token, except for ``causal`` and for the next-token rows of
    ``StudentLayout``.
    Padding positions contain an arbitrary token id.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention: BlockDiffusionMask
    rows: Tensor

    def padded(self, multiple: int) -> ModelInput:
        """The same input with L a multiple of ``multiple``, by padding behind every sequence; self where it is one."""
        length = self.input_ids.shape[1]
        more = -length % multiple
        if not more:
            return self

        def pad(tensor_NL: Tensor) -> Tensor:
            return torch.nn.functional.pad(tensor_NL, (0, more))

        rules = self.attention
        attention = BlockDiffusionMask(pad(rules.block), pad(rules.noised), pad(rules.valid))
        rows = self.rows + self.rows // length * more
        return ModelInput(pad(self.input_ids), pad(self.position_ids), attention, rows)

    def with_tiles(self) -> ModelInput:
        """With the lists of tiles that flex_attention needs (``BlockDiffusionMask.with_tiles``)."""
        return replace(self, attention=self.attention.with_tiles())


class AttentionLayout(Protocol):
    """Builds a model's input from noised tokens.

    The input for ``tokens`` with ``masked`` bool [N, S], scored at (sample, position), int64 [M] each;
    ``block`` is the model's block size, ``mask_id`` its mask token.
    """

    def __call__(
        self, tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int
    ) -> ModelInput:
        """Lay the tokens out."""
        ...


def full(tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int) -> ModelInput:
    """One noised copy, each position attends to all others (published, for the teacher); ``block`` has no effect."""
    return block_causal(tokens, masked, sample, position, block=tokens.ids.shape[1], mask_id=mask_id)


def block_causal(
    tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int
) -> ModelInput:
    """One noised copy, a block attends to itself and the (noised) blocks before it."""
    samples, length = tokens.ids.shape
    position_NL = torch.arange(length).expand(samples, length).contiguous()
    valid_NL = position_NL < tokens.length[:, None]
    attention = BlockDiffusionMask((position_NL // block).int(), torch.zeros_like(masked), valid_NL)
    return ModelInput(tokens.ids.masked_fill(masked, mask_id), position_NL, attention, sample * length + position)


def staircase(
    tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int
) -> ModelInput:
    """Two copies [xt ; x0]: a noised block attends to itself and the clean blocks before it. Rows are in xt."""
    none = sample[:0]
    return BLOCKS.input(tokens, masked, (sample, position), (none, none), block=block, mask_id=mask_id)


def causal(tokens: Tokens, masked: Tensor, sample: Tensor, position: Tensor, *, block: int, mask_id: int) -> ModelInput:
    """One clean copy, causal: a token's row is the position before it. ``masked``, ``block`` and ``mask_id`` have no
    effect: an autoregressive teacher knows all of the text before a token, and nothing after it.

    Raises:
        ValueError: a scored token is the first of its sample.
    """
    if bool((position == 0).any()):
        raise ValueError("a causal model cannot score the first token of a sample; prepare with a prompt before it")
    none = torch.zeros_like(masked)
    return block_causal(tokens, none, sample, position - 1, block=1, mask_id=mask_id)


def predicts_next(layout: AttentionLayout) -> bool:
    """Whether a layout is that of models whose row predicts the next token; masks then mean nothing to the teacher."""
    return layout is causal


def mask_of(data: PreparedData, side: str, layout: AttentionLayout) -> int:
    """The mask token that ``layout`` needs of ``side`` (student or teacher) of prepared data; -1 where it needs none.

    Raises:
        ValueError: the data were prepared for an autoregressive teacher, which has no mask token.
    """
    found = data.manifest[side]["mask_id"]
    if found is None and not predicts_next(layout):
        raise ValueError(
            f"{data.folder}: prepared for a {side} without a mask token: use --teacher-context causal for an "
            f"autoregressive teacher, or prepare again with --{side}-mask"
        )
    return -1 if found is None else int(found)


@dataclass(frozen=True, kw_only=True)
class StudentLayout:
    """The student's input [xt ; x0]: what of it there is, and what is scored.

    ``denoise``: the noised copy xt, whose masked tokens are scored at their own rows. ``next_token``: x0 attends token
    by token instead of by block, and its rows are scored on the next token; xt blocks then read these causal states of
    the blocks before them. Without ``denoise`` it is a plain causal language model. ``score_prompt``: whether tokens
    of the prompt are scored as next tokens.
    """

    denoise: bool = True
    next_token: bool = False
    score_prompt: bool = False

    def masked(self, masked_NS: Tensor) -> Tensor:
        """bool [N, S]: the masks that the input has: none without xt."""
        return masked_NS & self.denoise

    def next_tokens(self, tokens: Tokens, own_N: Tensor | None = None) -> Tensor:
        """bool [N, S]: the tokens to predict from those before them: the response's and its first end of text, but no
        response that the student wrote (``own_N``).

        The EOS after the first only fill the last block: a causal model never gets to see them.
        """
        position_S = torch.arange(tokens.ids.shape[1])
        first_N = torch.zeros_like(tokens.prompt) if self.score_prompt else tokens.prompt
        last_N = tokens.content_end if own_N is None else torch.where(own_N, tokens.prompt - 1, tokens.content_end)
        inside_NS = (position_S >= first_N.clamp(min=1)[:, None]) & (position_S <= last_N[:, None])
        return inside_NS & self.next_token

    def input(
        self,
        tokens: Tokens,
        masked: Tensor,
        denoised: tuple[Tensor, Tensor],
        predicted: tuple[Tensor, Tensor],
        *,
        block: int,
        mask_id: int,
    ) -> ModelInput:
        """Rows are the tokens ``denoised``, in xt, then those ``predicted``, each at the position before it in x0.

        Both are given by (sample, position), int64 [M] and [Q]. Each sample is packed to what its rows depend on: of xt
        the blocks from the first one that holds a response token, of x0 all blocks except the last, to which no xt
        block attends, or up to the last token that a next one is predicted from.
        """
        start_N = tokens.prompt // block * block
        noised_N = (tokens.length - start_N) * self.denoise
        clean_N = (tokens.length - 1) // block * block * self.denoise
        if self.next_token:
            clean_N = clean_N.maximum(tokens.content_end)
        total_N = noised_N + clean_N
        longest = -(-int(total_N.max()) // block) * block  # full blocks: fewer different shapes
        place_L = torch.arange(longest)
        valid_NL = place_L < total_N[:, None]
        noised_NL = place_L < noised_N[:, None]
        source_NL = torch.where(noised_NL, place_L + start_N[:, None], place_L - noised_N[:, None]).where(valid_NL, 0)
        ids_NL = tokens.ids.gather(1, source_NL).masked_fill(noised_NL & masked.gather(1, source_NL), mask_id)
        block_NL = source_NL // block * block  # by its first token, so that a causal x0 counts in the same unit
        if self.next_token:
            block_NL = torch.where(noised_NL, block_NL, source_NL)
        (sample_M, position_M), (sample_Q, position_Q) = denoised, predicted
        row_M = sample_M * longest + position_M - start_N[sample_M]
        row_Q = sample_Q * longest + noised_N[sample_Q] + position_Q - 1
        attention = BlockDiffusionMask(block_NL.int(), noised_NL, valid_NL)
        return ModelInput(ids_NL, source_NL, attention, torch.cat([row_M, row_Q]))


BLOCKS = StudentLayout()  # published
