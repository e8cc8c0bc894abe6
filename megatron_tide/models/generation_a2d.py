"""Block decoding for block diffusion language models: the sampler of the package and of every release.

This file travels into release folders beside the modelling file, so it needs torch and transformers only and imports
nothing of this project.

How a text is made (batch rows B, slots L, block size b, undecided positions R, vocabulary V)::

    slots      | pad block | prompt block | p p p m m m | m m m m m m |   m = mask, decided block by block
    pass 1       [ every prompt block, and the first block with masks ]      <- encodes the prompt and decides at once
    pass 2..       [ the same block, a few masks fewer ]
    next block     [ that block, finished | the next one, all masks ]        <- caches one, decides in the other

Blocks sit at multiples of the block size of each row's own positions, as in training; the first decoded block may hold
the end of the prompt. Rows with shorter prompts are moved right by WHOLE blocks, so that the batch decodes in step. A
block attends to itself and to everything before it; the keys and values of finished blocks never change, which is
what makes the cache exact. The head runs on undecided positions only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerationMixin

DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class DecodingRule:
    """How a block is decided.

    Every pass commits the ``tokens_per_step`` undecided positions the model is surest of, and with a ``threshold`` also
    each one whose probability exceeds it. ``temperature`` 0 takes the likeliest token; above it, a token is drawn from
    softmax(logits / temperature). Confidence is the chosen token's probability without temperature. The mask token is
    never chosen.
    """

    block_size: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    tokens_per_step: int = 1
    threshold: float | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for name in ("block_size", "max_new_tokens", "tokens_per_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"generate: {name} is {getattr(self, name)}; give 1 or more")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"generate: threshold is {self.threshold}; it is a probability, give 0 to 1")
        if self.temperature < 0.0 or not math.isfinite(self.temperature):
            raise ValueError(f"generate: temperature is {self.temperature}; give 0 (greedy) or more")


class BlockCache:
    """Keys and values per layer in one buffer of fixed capacity; what transformers' attention calls ``update`` on.

    A pass writes its keys behind the committed part and sees committed + own; writing again overwrites. So a pass over
    an unfinished block leaves nothing behind, and ``commit`` keeps what the last pass wrote. Nothing is ever copied.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``key``, ``value`` [B, heads, n, D] of one layer; return views of everything up to them."""
        if layer_idx == len(self._keys):
            self._keys.append(key.new_empty(*key.shape[:2], self.capacity, key.shape[-1]))
            self._values.append(value.new_empty(*value.shape[:2], self.capacity, value.shape[-1]))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed slots; transformers asks for it."""
        return self.length

    def commit(self, count: int) -> None:
        """Keep the first ``count`` slots that the last pass wrote."""
        self.length += count


def choose_tokens(
    logits_RV: torch.Tensor, rule: DecodingRule, generators: Sequence[torch.Generator], rows_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and confidence for each undecided position: (int64 [R], fp32 [R]).

    ``rows_R`` says which batch row a position belongs to; each row draws from its own generator, so a row's text does
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
        tokens_R = (logits_RV / rule.temperature + noise_RV).argmax(-1)  # Gumbel-max: a draw from the softmax
    chosen_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    return tokens_R, (chosen_R - logits_RV.logsumexp(-1)).exp()


def committed(confidence_Bb: torch.Tensor, rule: DecodingRule) -> torch.Tensor:
    """Which positions of a block this pass decides, bool [B, b]; decided ones come in with confidence -1.

    Equal confidences are settled left to right, so that the result does not depend on how a sort is made.
    """
    order = confidence_Bb.sort(dim=-1, descending=True, stable=True).indices
    rank_Bb = order.argsort(dim=-1)
    take_Bb = rank_Bb < rule.tokens_per_step
    if rule.threshold is not None:
        take_Bb = take_Bb | (confidence_Bb > rule.threshold)
    return take_Bb & (confidence_Bb >= 0.0)


class BlockDecoder:
    """One batch of prompts being continued.

    ``model`` has ``backbone(input_ids, attention_mask, position_ids, past_key_values) -> [B, Q, H]`` and
    ``head_weight [V, H]``. ``passes`` counts forward passes of the model.
    """

    def __init__(self, model: Any, prompts: Sequence[torch.Tensor], rule: DecodingRule, seeds: Sequence[int]) -> None:
        if not prompts:
            raise ValueError("generate: no prompt; give at least one")
        if len(seeds) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts but {len(seeds)} seeds; give one a prompt")
        self.model, self.rule, self.passes = model, rule, 0
        self.device = model.head_weight.device
        block, count = rule.block_size, len(prompts)
        self.prompt_B = torch.tensor([len(prompt) for prompt in prompts])
        first_B = self.prompt_B // block
        self.first = int(first_B.max())
        self.shift_B = (self.first - first_B) * block
        self.blocks_B = -(-(self.prompt_B + rule.max_new_tokens) // block) - first_B
        length = (self.first + int(self.blocks_B.max())) * block
        canvas = torch.full((count, length), rule.mask_token_id)
        undecided = torch.ones(count, length, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start, end = int(self.shift_B[row]), int(self.shift_B[row] + self.prompt_B[row])
            canvas[row, :start] = rule.pad_token_id
            canvas[row, start:end] = prompt.to("cpu")
            undecided[row, :end] = False
        self.tokens_BL, self.undecided_BL = canvas.to(self.device), undecided.to(self.device)
        self.shift_dev_B = self.shift_B.to(self.device)
        self.shifted = bool(self.shift_B.any())
        self.eos = torch.tensor(rule.eos_token_ids, dtype=torch.int64, device=self.device)
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.cache = BlockCache(length)

    @torch.no_grad()
    def run(self) -> Iterator[None]:
        """Decode block after block; yields after every pass, when ``tokens_BL`` and ``undecided_BL`` have moved on."""
        finished_B = torch.zeros(len(self.prompt_B), dtype=torch.bool, device=self.device)
        blocks_B = self.blocks_B.to(self.device)
        for number in range(int(self.blocks_B.max())):
            start = (self.first + number) * self.rule.block_size
            end = start + self.rule.block_size
            finished_B = finished_B | (blocks_B <= number)
            open_Bb = self.undecided_BL[:, start:end] & ~finished_B.unsqueeze(1)
            while open_Bb.any():
                self._decide(start, end, open_Bb)
                open_Bb = self._still_open(start, end, finished_B)
                yield
            finished_B = finished_B | self._ends(start, end).any(-1)
            if finished_B.all():
                return

    def _decide(self, start: int, end: int, open_Bb: torch.Tensor) -> None:
        hidden_BQH = self._forward(end)[:, start - end :]
        rows_R = open_Bb.nonzero()[:, 0]
        logits_RV = hidden_BQH[open_Bb] @ self.model.head_weight.to(hidden_BQH.dtype).T
        tokens_R, confidence_R = choose_tokens(logits_RV, self.rule, self.generators, rows_R)
        confidence_Bb = torch.full(open_Bb.shape, -1.0, device=self.device)
        confidence_Bb[open_Bb] = confidence_R
        take_Bb = committed(confidence_Bb, self.rule)
        proposal_Bb = self.tokens_BL[:, start:end].clone()
        proposal_Bb[open_Bb] = tokens_R
        self.tokens_BL[:, start:end] = torch.where(take_Bb, proposal_Bb, self.tokens_BL[:, start:end])
        self.undecided_BL[:, start:end] &= ~take_Bb

    def _forward(self, end: int) -> torch.Tensor:
        """Hidden states of every slot from the committed ones up to ``end``; commits those of finished blocks."""
        block, begin = self.rule.block_size, self.cache.length
        query_Q = torch.arange(begin, end, device=self.device)
        hidden = self.model.backbone(
            self.tokens_BL[:, begin:end],
            attention_mask=self._attend(query_Q),
            position_ids=(query_Q - self.shift_dev_B.unsqueeze(1)).clamp(min=0),
            past_key_values=self.cache,
        )
        self.cache.commit(end - block - begin)
        self.passes += 1
        return hidden

    def _attend(self, query_Q: torch.Tensor) -> torch.Tensor | None:
        """bool [B, 1, Q, K] over the slots up to the last query; None (faster) where everyone sees everything."""
        block, end = self.rule.block_size, int(self.cache.length + len(query_Q))
        if len(query_Q) == block and not self.shifted:
            return None
        key_K = torch.arange(end, device=self.device)
        seen_QK = query_Q.unsqueeze(1) // block >= key_K // block
        real_BK = key_K >= self.shift_dev_B.unsqueeze(1)
        own_QK = query_Q.unsqueeze(1) == key_K  # a padding slot sees itself: softmax over nothing is NaN
        return ((seen_QK & real_BK.unsqueeze(1)) | own_QK).unsqueeze(1)

    def _ends(self, start: int, end: int) -> torch.Tensor:
        """Decided end-of-text tokens of the answer in these slots, bool [B, end - start]."""
        slots = torch.arange(start, end, device=self.device)
        answer_Bb = slots >= (self.shift_B + self.prompt_B).to(self.device).unsqueeze(1)
        is_eos_Bb = torch.isin(self.tokens_BL[:, start:end], self.eos)
        return is_eos_Bb & answer_Bb & ~self.undecided_BL[:, start:end]

    def _still_open(self, start: int, end: int, finished_B: torch.Tensor) -> torch.Tensor:
        """Undecided positions of the rows whose answer can still change in these slots, bool [B, end - start].

        What lies behind an end of text, or behind ``max_new_tokens``, is cut off in the end, and what is decided stays:
        a row needs no further pass once everything before that point is decided.
        """
        slots = torch.arange(start, end, device=self.device)
        limit_B = (self.shift_B + self.prompt_B + self.rule.max_new_tokens).to(self.device)
        kept_Bb = (self._ends(start, end).cumsum(-1) == 0) & (slots < limit_B.unsqueeze(1))
        undecided_Bb = self.undecided_BL[:, start:end]
        waiting_B = (undecided_Bb & kept_Bb).any(-1) & ~finished_B
        return undecided_Bb & waiting_B.unsqueeze(1)

    def completions(self) -> list[torch.Tensor]:
        """Each row's answer so far, int64, cut after its first end of text (kept) and at ``max_new_tokens``."""
        answers = []
        for row in range(len(self.prompt_B)):
            begin = int(self.shift_B[row] + self.prompt_B[row])
            answer = self.tokens_BL[row, begin : begin + self.rule.max_new_tokens]
            ends = (torch.isin(answer, self.eos) & ~self.undecided_BL[row, begin : begin + len(answer)]).nonzero()
            answers.append(answer[: int(ends[0, 0]) + 1] if len(ends) else answer)
        return answers


class BlockGenerationMixin(GenerationMixin):
    """Gives a block diffusion model ``generate``; its defaults come from ``config`` and ``generation_config``."""

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_config: Any = None,
        *,
        inputs: torch.Tensor | None = None,
        seed: int | Sequence[int] = 0,
        **knobs: Any,
    ) -> torch.Tensor:
        """Continue prompts by block decoding; int64 [B, P + longest answer], answers padded behind their end of text.

        Args:
            input_ids: [B, P] prompts, padded on either side (``attention_mask`` 0 marks padding). ``inputs`` is the
                same under transformers' name.
            seed: one number (row r draws from seed + r) or one a row; used when ``temperature`` > 0.
            knobs: fields of ``DecodingRule`` (``max_new_tokens``, ``tokens_per_step``, ``threshold``, ``temperature``,
                ``block_size``, ``mask_token_id``, ``pad_token_id``), ``eos_token_id``, and ``do_sample``.
        """
        ids_BP = input_ids if input_ids is not None else inputs
        if ids_BP is None or ids_BP.dim() != 2:
            raise ValueError("generate: give input_ids as a [batch, length] tensor")
        rule = decoding_rule(self, generation_config or getattr(self, "generation_config", None), knobs)
        keep_BP = torch.ones_like(ids_BP) if attention_mask is None else attention_mask
        prompts = [ids[keep.bool()] for ids, keep in zip(ids_BP, keep_BP)]
        seeds = [seed + row for row in range(len(prompts))] if isinstance(seed, int) else list(seed)
        decoder = BlockDecoder(self, prompts, rule, seeds)
        for _ in decoder.run():
            pass
        answers = decoder.completions()
        filled = ids_BP.new_full((len(answers), max(len(answer) for answer in answers)), rule.pad_token_id)
        for row, answer in enumerate(answers):
            filled[row, : len(answer)] = answer
        return torch.cat((ids_BP, filled), dim=1)


def decoding_rule(model: Any, defaults: Any, knobs: dict[str, Any]) -> DecodingRule:
    """The rule that ``knobs`` ask for, completed from ``defaults`` (a generation config) and the model's config."""
    known = set(DecodingRule.__dataclass_fields__) | {"eos_token_id", "do_sample"}
    unknown = sorted(set(knobs) - known)
    if unknown:
        raise ValueError(f"generate: unknown argument {', '.join(unknown)}; known are {', '.join(sorted(known))}")

    def find(name: str) -> Any:
        for source in (knobs.get(name), getattr(defaults, name, None), getattr(model.config, name, None)):
            if source is not None:
                return source
        return None

    eos = knobs.get("eos_token_ids", find("eos_token_id"))
    eos_ids = tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (int(eos),)
    pad = find("pad_token_id")
    pad = pad if pad is not None else (eos_ids[0] if eos_ids else None)
    values = {"block_size": find("block_size"), "mask_token_id": find("mask_token_id"), "pad_token_id": pad}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"generate: the model's config has no {name}; pass {name}=...")
    # Sampling is asked for by a temperature, or by do_sample as everywhere else in transformers.
    sample = knobs.get("do_sample", bool(knobs.get("temperature")) or getattr(defaults, "do_sample", False))
    temperature = find("temperature") if sample else 0.0
    for name in ("max_new_tokens", "tokens_per_step", "threshold"):
        if find(name) is not None:
            values[name] = find(name)
    return DecodingRule(eos_token_ids=eos_ids, temperature=1.0 if temperature is None else temperature, **values)
