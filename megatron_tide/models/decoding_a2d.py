"""Block decoding for block diffusion language models: the sampler of the package and of every release.

This file is copied into releases next to the modelling file, so it needs only torch and imports nothing of this
project.

How text is generated (batch rows B, of which A are unfinished; slots L, block size b, undecided positions R, vocabulary
V)::

    slots      | pad block | prompt block | p p p m m m | m m m m m m |   m = mask, decided block by block
    pass 1       [ every prompt block, and the first block with masks ]      <- encodes the prompt, decides first tokens
    pass 2..       [ the same block, a few masks fewer ]
    next block     [ that block, finished | the next one, all masks ]        <- caches one, decides in the other

Blocks sit at multiples of the block size of each row's own positions, as in training; the first decoded block can
contain the end of the prompt. Rows with shorter prompts are shifted right by full blocks, so that the batch decodes in
step. A block attends to itself and to everything before it; the keys and values of finished blocks never change, which
is what makes the cache exact. The head runs on undecided positions only. A row whose answer has ended leaves the batch.

A prompt can contain mask tokens: they are filled in block by block, and see everything up to the end of their block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class DecodingRule:
    """How a block is decided.

    Every pass predicts all undecided positions and keeps the ``tokens_per_step`` most confident tokens; the others are
    masked again. With a ``threshold`` (LLaDA2's rule, published with 0.95) tokens with a higher probability are kept
    too. ``least_confident_first`` keeps the least confident ones instead (for experiments). ``temperature`` 0 takes the
    most likely token; above 0, a token is sampled from softmax(logits / temperature). Confidence is the chosen token's
    probability without temperature. The mask token is never chosen. ``max_new_tokens`` 0 only fills in the masks of
    the prompt.

    End of text fills the blocks behind an answer in training, so a model is often surest of it at the end of a block,
    and an answer may end before its beginning is decided. With ``eos_in_order`` end of text is decided only at the
    first undecided position of a block. It is never chosen for the first ``min_new_tokens`` tokens of an answer.
    """

    block_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    min_new_tokens: int = 0
    eos_in_order: bool = False
    tokens_per_step: int = 1
    threshold: float | None = None
    temperature: float = 0.0
    least_confident_first: bool = False

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("tokens_per_step", 1), ("max_new_tokens", 0), ("min_new_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"generate: {name} is {getattr(self, name)}; use {least} or more")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"generate: threshold is {self.threshold}; use a probability from 0 to 1")
        if self.temperature < 0.0 or not math.isfinite(self.temperature):
            raise ValueError(f"generate: temperature is {self.temperature}; use 0 (greedy) or more")


class BlockCache:
    """Keys and values per layer in one buffer of fixed capacity; with the ``update`` that transformers' attention
    calls.

    A pass writes its keys after the committed part and attends to both; the next pass overwrites them, unless
    ``commit`` keeps what the last pass wrote. Nothing is copied, except rows that move up when others leave the batch
    (``keep``).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``key``, ``value`` [A, heads, n, D] of one layer; return views of everything up to them."""
        if layer_idx == len(self._keys):
            self._keys.append(key.new_empty(*key.shape[:2], self.capacity, key.shape[-1]))
            self._values.append(value.new_empty(*value.shape[:2], self.capacity, value.shape[-1]))
        rows = len(key)
        keys, values = self._keys[layer_idx][:rows], self._values[layer_idx][:rows]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of committed slots (transformers calls this)."""
        return self.length

    def commit(self, count: int) -> None:
        """Keep the first ``count`` slots that the last pass wrote."""
        self.length += count

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at ``places`` (ascending), in place."""
        for tensor in (*self._keys, *self._values):
            for new, old in enumerate(places):
                if new != old:
                    tensor[new, :, : self.length] = tensor[old, :, : self.length]


def choose_tokens(
    logits_RV: torch.Tensor, rule: DecodingRule, generators: Sequence[torch.Generator], rows_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and confidence for each undecided position: (int64 [R], fp32 [R]).

    ``rows_R`` is the batch row of each position; each row samples from its own generator, so a row's text does
    not depend on which rows it was batched with.
    """
    logits_RV = logits_RV.float()
    logits_RV[:, rule.mask_token_id] = float("-inf")
    if rule.temperature == 0.0:
        tokens_R = logits_RV.argmax(-1)
    else:
        noise_RV = torch.empty_like(logits_RV)
        for row in rows_R.unique().tolist():
            mine = (rows_R == row).nonzero().squeeze(-1)
            draws = torch.empty(len(mine), logits_RV.shape[1]).exponential_(generator=generators[row])
            noise_RV[mine] = draws.log().neg().to(logits_RV.device)
        tokens_R = (logits_RV / rule.temperature + noise_RV).argmax(-1)  # Gumbel-max: a sample from the softmax
    chosen_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    return tokens_R, (chosen_R - logits_RV.logsumexp(-1)).exp()


def committed(confidence_Bb: torch.Tensor, rule: DecodingRule) -> torch.Tensor:
    """Which positions of a block this pass decides, bool [B, b]; decided ones come in with confidence -1.

    Equal confidences are settled left to right, so that the result does not depend on how a sort is made.
    """
    urgency_Bb = confidence_Bb
    if rule.least_confident_first:
        urgency_Bb = torch.where(confidence_Bb < 0.0, -2.0, -confidence_Bb)
    order = urgency_Bb.sort(dim=-1, descending=True, stable=True).indices
    rank_Bb = order.argsort(dim=-1)
    take_Bb = rank_Bb < rule.tokens_per_step
    if rule.threshold is not None:
        take_Bb = take_Bb | (confidence_Bb > rule.threshold)
    return take_Bb & (confidence_Bb >= 0.0)


class BlockDecoder:
    """One batch of prompts being continued.

    ``model`` has ``backbone(input_ids, attention_mask, position_ids, past_key_values) -> [B, Q, H]`` and
    ``head_weight [V, H]``. ``passes`` counts forward passes; ``end`` is the slot behind the block under way; ``rows_A``
    are the rows still being continued (A of the B), in the order the cache has them.
    """

    def __init__(self, model: Any, prompts: Sequence[torch.Tensor], rule: DecodingRule, seeds: Sequence[int]) -> None:
        if not prompts:
            raise ValueError("generate: no prompt; pass at least one")
        if len(seeds) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts but {len(seeds)} seeds; pass one per prompt")
        self.model, self.rule, self.passes, self.end = model, rule, 0, 0
        self.device = model.head_weight.device
        block, count = rule.block_size, len(prompts)
        prompts = [prompt.to("cpu") for prompt in prompts]
        holes = [prompt == rule.mask_token_id for prompt in prompts]
        self.fills = any(bool(hole.any()) for hole in holes)
        if rule.max_new_tokens == 0 and not all(bool(hole.any()) for hole in holes):
            raise ValueError("generate: max_new_tokens is 0, and a prompt has no mask to fill in; use 1 or more")
        self.prompt_B = torch.tensor([len(prompt) for prompt in prompts])
        opens = [int(hole.nonzero()[0, 0]) if hole.any() else len(hole) for hole in holes]
        first_B = torch.tensor(opens) // block  # the block where a row's decoding begins
        self.first = int(first_B.max())
        self.shift_B = (self.first - first_B) * block
        self.blocks_B = -(-(self.prompt_B + rule.max_new_tokens) // block) - first_B
        length = (self.first + int(self.blocks_B.max())) * block
        canvas = torch.full((count, length), rule.mask_token_id)
        undecided = torch.ones(count, length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start, end = int(self.shift_B[row]), int(self.shift_B[row] + self.prompt_B[row])
            canvas[row, :start] = rule.pad_token_id
            canvas[row, start:end] = prompt
            undecided[row, :start] = False
            undecided[row, start:end] = holes[row]
        self.tokens_BL, self.undecided_BL = canvas.to(self.device), undecided.to(self.device)
        self.rows_A = torch.arange(count, device=self.device)
        self.blocks_dev_B = self.blocks_B.to(self.device)
        self.shift_dev_B = self.shift_B.to(self.device)
        self.answer_dev_B = (self.shift_B + self.prompt_B).to(self.device)  # the slot where a row's answer begins
        self.shifted = bool(self.shift_B.any())
        self.eos = torch.tensor(rule.eos_token_ids, dtype=torch.int64, device=self.device)
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.cache = BlockCache(length)

    @torch.no_grad()
    def run(self) -> Iterator[bool]:
        """Decode block after block; after every pass, yields whether it has finished its block.

        After that ``tokens_BL`` and ``undecided_BL`` change again.
        """
        for number in range(int(self.blocks_B.max())):
            start = (self.first + number) * self.rule.block_size
            end = self.end = start + self.rule.block_size
            open_Ab = self._open(start, end)
            is_open = bool(open_Ab.any())
            while is_open:
                self._decide(start, end, open_Ab)
                open_Ab = self._open(start, end)
                is_open = bool(open_Ab.any())
                yield not is_open
            alive_A = (self.blocks_dev_B[self.rows_A] > number + 1) & ~self._ends(start, end).any(-1)
            if not alive_A.all():
                self.rows_A = self.rows_A[alive_A]
                self.cache.keep(alive_A.nonzero().squeeze(-1).tolist())
            if not len(self.rows_A):
                return

    def _decide(self, start: int, end: int, open_Ab: torch.Tensor) -> None:
        hidden_AQH = self._forward(end)[:, start - end :]
        at_R, places_R = open_Ab.nonzero(as_tuple=True)
        rows_R = self.rows_A[at_R]
        logits_RV = hidden_AQH[at_R, places_R] @ self.model.head_weight.to(hidden_AQH.dtype).T
        if self.fills or self.rule.min_new_tokens:  # text follows the filled-in tokens: the answer cannot end there
            too_early_R = start + places_R < self.answer_dev_B[rows_R] + self.rule.min_new_tokens
            logits_RV[:, self.eos] = logits_RV[:, self.eos].masked_fill(too_early_R.unsqueeze(1), float("-inf"))
        tokens_R, confidence_R = choose_tokens(logits_RV, self.rule, self.generators, rows_R)
        if self.rule.eos_in_order:
            first_R = open_Ab.int().argmax(1)[at_R]
            waits_R = torch.isin(tokens_R, self.eos) & (places_R != first_R)
            confidence_R = confidence_R.masked_fill(waits_R, -1.0)  # as if decided: not in this pass
        confidence_Ab = torch.full(open_Ab.shape, -1.0, device=self.device)
        confidence_Ab[at_R, places_R] = confidence_R
        take_R = committed(confidence_Ab, self.rule)[at_R, places_R]
        rows_R, slots_R = rows_R[take_R], start + places_R[take_R]
        self.tokens_BL[rows_R, slots_R] = tokens_R[take_R]
        self.undecided_BL[rows_R, slots_R] = False

    def _forward(self, end: int) -> torch.Tensor:
        """Hidden states of every slot from the committed ones up to ``end``; commits those of finished blocks."""
        block, begin = self.rule.block_size, self.cache.length
        query_Q = torch.arange(begin, end, device=self.device)
        shift_A1 = self.shift_dev_B[self.rows_A].unsqueeze(1)
        hidden_AQH = self.model.backbone(
            self.tokens_BL[self.rows_A, begin:end],
            attention_mask=self._attend(query_Q, shift_A1),
            position_ids=(query_Q - shift_A1).clamp(min=0),
            past_key_values=self.cache,
        )
        self.cache.commit(end - block - begin)
        self.passes += 1
        return hidden_AQH

    def _attend(self, query_Q: torch.Tensor, shift_A1: torch.Tensor) -> torch.Tensor | None:
        """bool [A, 1, Q, K] over the slots up to the last query; None (faster) where everyone sees everything."""
        block, end = self.rule.block_size, int(self.cache.length + len(query_Q))
        if len(query_Q) == block and not self.shifted:
            return None
        key_K = torch.arange(end, device=self.device)
        seen_QK = query_Q.unsqueeze(1) // block >= key_K // block
        real_AK = key_K >= shift_A1
        own_QK = query_Q.unsqueeze(1) == key_K  # a padding slot attends to itself: an empty softmax is NaN
        return ((seen_QK & real_AK.unsqueeze(1)) | own_QK).unsqueeze(1)

    def _ends(self, start: int, end: int) -> torch.Tensor:
        """Decided end-of-text tokens of the answer in these slots, bool [A, end - start]."""
        slots = torch.arange(start, end, device=self.device)
        answer_Ab = slots >= self.answer_dev_B[self.rows_A].unsqueeze(1)
        is_eos_Ab = torch.isin(self.tokens_BL[self.rows_A, start:end], self.eos)
        return is_eos_Ab & answer_Ab & ~self.undecided_BL[self.rows_A, start:end]

    def _open(self, start: int, end: int) -> torch.Tensor:
        """Undecided positions of the rows whose answer can still change in these slots, bool [A, end - start].

        Tokens after an end of text, or after ``max_new_tokens``, are cut off at the end, and decided tokens are final:
        a row needs no further pass once everything before that point is decided.
        """
        slots = torch.arange(start, end, device=self.device)
        limit_A = self.answer_dev_B[self.rows_A] + self.rule.max_new_tokens
        kept_Ab = (self._ends(start, end).cumsum(-1) == 0) & (slots < limit_A.unsqueeze(1))
        undecided_Ab = self.undecided_BL[self.rows_A, start:end]
        return undecided_Ab & (undecided_Ab & kept_Ab).any(-1, keepdim=True)

    def prompts(self) -> list[torch.Tensor]:
        """Each row's prompt, int64, with what was filled in so far."""
        spans = zip(self.tokens_BL, self.shift_B.tolist(), self.prompt_B.tolist())
        return [tokens[start : start + length] for tokens, start, length in spans]

    def completions(self, settled: bool = False) -> list[torch.Tensor]:
        """Each row's answer so far, int64, cut after its first end of text (kept) and at ``max_new_tokens``.

        ``settled``: cut before its first undecided token as well.
        """
        answers = []
        for row in range(len(self.prompt_B)):
            begin = int(self.shift_B[row] + self.prompt_B[row])
            answer = self.tokens_BL[row, begin : begin + self.rule.max_new_tokens]
            undecided = self.undecided_BL[row, begin : begin + len(answer)]
            if settled and undecided.any():
                answer = answer[: int(undecided.int().argmax())]
            ends = (torch.isin(answer, self.eos) & ~undecided[: len(answer)]).nonzero()
            answers.append(answer[: int(ends[0, 0]) + 1] if len(ends) else answer)
        return answers
