"""Block decoding for block diffusion language models: the sampler of the package and of every release.

This file is copied into releases next to the modelling file, so it needs only torch and imports nothing of this
project but ``sampling_a2d.py``.

How text is generated (batch rows B, of which A are unfinished; slots L, block size b, undecided positions R, vocabulary
V)::

    slots      | pad block | prompt block | p p p m m m | m m m m m m |   m = mask, decided block by block
    pass 1       [ every prompt block, and the first block with masks ]      <- encodes the prompt, decides first tokens
    pass 2..       [ the same block, a few masks fewer ]
    next block     [ that block, finished | the next one, all masks ]        <- caches one, decides in the other

Where blocks begin is the rule's ``block_layout``. "sequence": at multiples of the block size of each row's own
positions, as in training; the first decoded block can contain the end of the prompt. "answer": the answer begins a
block, as in the published sampler; the first block of the prompt is shorter, and so is the last one of the answer.
Rows with shorter prompts are shifted right, so that the batch decodes in step. A block attends to itself and to
everything before it; the keys and values of finished blocks never change, which is what makes the cache exact. The
head runs on undecided positions only. A row whose answer has ended leaves the batch.

On a GPU the cache is one buffer of fixed size with a mask, every position of a block runs through the head, and a pass
is recorded once for each of its shapes as a CUDA graph and replayed. The host waits twice per block (how many passes it
takes, who has ended) and never in a pass; with a ``threshold``, or ``eos_in_order`` and several tokens per pass, once
per pass more: whether the block is finished. ``A2D_GRAPHS=0`` in the environment turns the recording off.

A prompt can contain mask tokens: they are filled in block by block, and see everything up to the end of their block.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from .sampling_a2d import BLOCKS_AT_ANSWER, DecodingRule, choose_tokens, committed, gumbel_noise


class BlockCache:
    """Keys and values per layer in one buffer of fixed capacity; with the ``update`` that transformers' attention
    calls.

    A pass writes its keys after the committed part and attends to both; the next pass overwrites them, unless
    ``commit`` keeps what the last pass wrote. Nothing is copied, except rows that move up when others leave the batch
    (``keep``). ``static``: a pass writes at ``slots``, a tensor, and attends to the whole buffer under a mask: its
    shapes and addresses are those of every other pass.
    """

    slots: torch.Tensor  # int64 [n]: where the pass under way writes, if static

    def __init__(self, capacity: int, static: bool = False) -> None:
        self.capacity, self.static = capacity, static
        self.length = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store ``key``, ``value`` [A, heads, n, D] of one layer; return views of everything up to them, or of all."""
        if layer_idx == len(self._keys):  # zeros: a masked value that is not a number would still spread
            self._keys.append(key.new_zeros(*key.shape[:2], self.capacity, key.shape[-1]))
            self._values.append(value.new_zeros(*value.shape[:2], self.capacity, value.shape[-1]))
        rows = len(key)
        keys, values = self._keys[layer_idx][:rows], self._values[layer_idx][:rows]
        if self.static:
            return keys.index_copy_(2, self.slots, key), values.index_copy_(2, self.slots, value)
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


class _Passes:
    """Runs a pass; with ``record``, as a CUDA graph of its shape: the first one runs, the second is recorded.

    What a pass reads and writes stays where it is; :meth:`forget` when that has changed.
    """

    _one_at_a_time = threading.Lock()  # torch records one graph at a time in a process

    def __init__(self, record: bool) -> None:
        self.record = record
        self.forget()

    def forget(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, shape: int, work: Callable[[], None]) -> None:
        if not self.record or shape not in self._graphs:
            self._graphs[shape] = None  # the first one also makes what may not be made while it is recorded
            return work()
        graph = self._graphs[shape]
        if graph is None:
            graph = self._graphs[shape] = self._recorded(work)
        return work() if graph is None else graph.replay()

    def _recorded(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        stream = torch.cuda.current_stream()
        try:
            graph, own = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            with self._one_at_a_time, torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # torch leaves its own one current
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"generate: no CUDA graph ({reason}); each pass is launched by the host", stacklevel=2)
            self.record = False
            return None
        return graph


def _warn_if_longer(model: Any, length: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        warnings.warn(
            f"generate: prompt and answer can have {length} tokens, the model was made for {most} "
            "(max_position_embeddings); what it writes behind them is unlikely to make sense",
            stacklevel=3,
        )


def _place(model: Any) -> tuple[torch.device, bool]:
    """The device that passes begin and end on, and whether accelerate moves weights or hidden states between devices:
    then the head's weight may be on none."""
    moved = getattr(getattr(model, "lm_head", None), "_hf_hook", None)
    if (device := getattr(moved, "execution_device", None)) is not None:
        return torch.device(device), True
    weight = model.head_weight
    weight = weight if isinstance(weight, torch.Tensor) else next(model.parameters())  # quantized: no tensor
    return weight.device, moved is not None


class BlockDecoder:
    """One batch of prompts being continued.

    ``model`` has ``backbone(input_ids, attention_mask, position_ids, past_key_values) -> [B, Q, H]`` and
    ``head([..., H]) -> [..., V]``. ``passes`` counts forward passes, ``passes_B`` those that decide tokens of each row;
    ``end`` is the slot behind the block under way; ``rows_A`` are the rows still being continued (A of the B), in the
    order the cache has them. ``order_BL``: which of its row's ``passes_B`` decided a token, from 1; 0: none.
    ``static``: passes of fixed shapes, which wait for nothing; None: on one GPU.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[torch.Tensor],
        rule: DecodingRule,
        seeds: Sequence[int],
        static: bool | None = None,
    ) -> None:
        if not prompts:
            raise ValueError("generate: no prompt; pass at least one")
        if len(seeds) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts but {len(seeds)} seeds; pass one per prompt")
        self.model, self.rule, self.passes, self.end = model, rule, 0, 0
        self.device, moves = _place(model)
        _warn_if_longer(model, max(map(len, prompts)) + rule.max_new_tokens)
        prompts = [prompt.to("cpu") for prompt in prompts]
        holes = [prompt == rule.mask_token_id for prompt in prompts]
        self.fills = any(bool(hole.any()) for hole in holes)
        if rule.max_new_tokens == 0 and not all(bool(hole.any()) for hole in holes):
            raise ValueError("generate: max_new_tokens is 0, and a prompt has no mask to fill in; use 1 or more")
        at_answer = BLOCKS_AT_ANSWER[rule.block_layout]
        length = self._align(prompts, holes, at_answer)
        self.rows_A = torch.arange(len(prompts), device=self.device)
        self.blocks_dev_B, self.shift_dev_B = self.blocks_B.to(self.device), self.shift_B.to(self.device)
        self.answer_dev_B = (self.shift_B + self.prompt_B).to(self.device)  # the slot where a row's answer begins
        self.shifted = bool(self.shift_B.any())
        # The slot behind a row's last block: nothing attends to what is there.
        self.stop_dev_B = self.answer_dev_B + rule.max_new_tokens if at_answer else torch.full_like(self.rows_A, length)
        self.whole = int(self.stop_dev_B.min())  # up to this slot, the blocks of all rows are whole
        self.eos = torch.tensor(rule.eos_token_ids, dtype=torch.int64, device=self.device)
        self.seeds_B = torch.tensor([int(seed) % 2**63 for seed in seeds], device=self.device)
        self.turn = torch.zeros((), dtype=torch.int64, device=self.device)  # pass of the block under way
        self.live_A, self.passes_B = torch.ones_like(self.rows_A, dtype=torch.bool), torch.zeros_like(self.rows_A)
        self.most_B, self.order_BL = [rule.max_new_tokens] * len(prompts), torch.zeros_like(self.tokens_BL)
        self.static = self.device.type == "cuda" and not moves if static is None else static
        self.cache = BlockCache(-(-length // 64) * 64 if self.static else length, self.static)  # in whole tiles
        self._slots: dict[int, torch.Tensor] = {}  # of the queries, by their number
        self._passes = _Passes(self.device.type == "cuda" and self.static and os.environ.get("A2D_GRAPHS") != "0")

    def _align(self, prompts: Sequence[torch.Tensor], holes: Sequence[torch.Tensor], at_answer: bool) -> int:
        """Lay the rows out so that all of them decode the same block; the number of slots."""
        block, rule = self.rule.block_size, self.rule
        self.prompt_B = torch.tensor([len(prompt) for prompt in prompts])
        opens = [int(hole.nonzero()[0, 0]) if hole.any() else len(hole) for hole in holes]
        short_B = -self.prompt_B % block * at_answer  # tokens that the first block is short of
        first_B = (short_B + torch.tensor(opens)) // block  # the block where a row's decoding begins
        self.first = int(first_B.max())
        shift_B = (self.first - first_B) * block + short_B
        self.short = int(shift_B.min())  # slots that the first block of every row is short of: there are none for them
        self.shift_B = shift_B - self.short
        self.blocks_B = -(-(short_B + self.prompt_B + rule.max_new_tokens) // block) - first_B
        length = (self.first + int(self.blocks_B.max())) * block - self.short
        canvas = torch.full((len(prompts), length), rule.mask_token_id)
        undecided = torch.ones_like(canvas, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            start, end = int(self.shift_B[row]), int(self.shift_B[row] + self.prompt_B[row])
            canvas[row, :start] = rule.pad_token_id
            canvas[row, start:end] = prompt
            undecided[row, :start] = False
            undecided[row, start:end] = holes[row]
            if at_answer:
                undecided[row, end + rule.max_new_tokens :] = False
        self.tokens_BL, self.undecided_BL = canvas.to(self.device), undecided.to(self.device)
        return length

    @torch.no_grad()
    def run(self) -> Iterator[bool]:
        """Decode block after block; after every pass, yields whether its block is finished; then all changes again."""
        rule = self.rule
        # Otherwise the number of passes is known: each decides ``tokens_per_step`` tokens of a row that has so many.
        asks = not self.static or rule.threshold is not None or (rule.eos_in_order and rule.tokens_per_step > 1)
        for number in range(int(self.blocks_B.max())):
            end = self.end = (self.first + number + 1) * rule.block_size - self.short
            start = max(0, end - rule.block_size)
            self.turn.zero_()
            left = -(-int(self._open(start, end).sum(-1).max()) // rule.tokens_per_step)
            last = self.passes + rule.block_size
            while left and self.passes < last:
                self._pass(end)
                left = int(self._open(start, end).any()) if asks else left - 1
                yield not left
            alive_A = self.live_A & (self.blocks_dev_B[self.rows_A] > number + 1) & ~self._ends(start, end).any(-1)
            *alive, stuck = torch.cat((alive_A, self._open(start, end).any().view(1))).tolist()
            if stuck:
                raise ValueError("generate: the model's outputs are not numbers; its weights or precision are broken")
            self._continue(alive)
            if not len(self.rows_A):
                return

    def _continue(self, alive: list[bool]) -> None:
        """Go on with these rows. A recorded pass is for a number of rows: then the others stay until half are done."""
        places = [place for place, is_alive in enumerate(alive) if is_alive]
        if len(places) < len(alive) and (not self._passes.record or 2 * len(places) <= len(alive)):
            self.rows_A = self.rows_A[places]
            self.live_A = torch.ones_like(self.rows_A, dtype=torch.bool)
            self.cache.keep(places)
            self._passes.forget()
        else:
            self.live_A.copy_(torch.tensor(alive))

    def _pass(self, end: int) -> None:
        """One pass over every slot from the committed ones up to ``end``; commits those of finished blocks."""
        begin = self.cache.length
        slots_Q = torch.arange(begin, end, device=self.device)
        slots_Q = self._slots.setdefault(end - begin, slots_Q).copy_(slots_Q)
        self._passes(end - begin, partial(self._work, slots_Q))
        self.cache.commit(max(0, end - self.rule.block_size - begin))
        self.passes += 1

    def _work(self, slots_Q: torch.Tensor) -> None:
        """The part of a pass on the device."""
        self.turn.add_(1)
        slots_b = slots_Q[-self.rule.block_size :]
        tokens_Ab, undecided_Ab = (of[self.rows_A[:, None], slots_b] for of in (self.tokens_BL, self.undecided_BL))
        open_Ab = self._open_of(tokens_Ab, undecided_Ab, slots_b)
        self.passes_B[self.rows_A] += open_Ab.any(-1)
        chosen_Ab, confidence_Ab = self._predict(self._forward(slots_Q)[:, -len(slots_b) :], open_Ab, slots_b)
        take_Ab = committed(confidence_Ab, self.rule)
        self.tokens_BL[self.rows_A[:, None], slots_b] = torch.where(take_Ab, chosen_Ab, tokens_Ab)
        order_Ab = self.order_BL[self.rows_A[:, None], slots_b]
        now_A1 = self.passes_B[self.rows_A].unsqueeze(1)
        self.order_BL[self.rows_A[:, None], slots_b] = torch.where(take_Ab, now_A1, order_Ab)
        self.undecided_BL[self.rows_A[:, None], slots_b] = undecided_Ab & ~take_Ab

    def _predict(
        self, hidden_AbH: torch.Tensor, open_Ab: torch.Tensor, slots_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token and confidence of every position of a block [A, b]; confidence -1 where nothing is to be decided."""
        rule = self.rule
        if self.static:
            at_R = torch.arange(open_Ab.numel(), device=self.device) // len(slots_b)
            places_R = torch.arange(open_Ab.numel(), device=self.device) % len(slots_b)
        else:
            at_R, places_R = open_Ab.nonzero(as_tuple=True)
        rows_R, slots_R = self.rows_A[at_R], slots_b[places_R]
        logits_RV = self.model.head(hidden_AbH[at_R, places_R])
        if self.fills or rule.min_new_tokens:  # text follows the filled-in tokens: the answer cannot end there
            too_early_R = slots_R < self.answer_dev_B[rows_R] + rule.min_new_tokens
            logits_RV[:, self.eos] = logits_RV[:, self.eos].masked_fill(too_early_R.unsqueeze(1), float("-inf"))
        noise_RV = None
        if rule.temperature > 0.0:
            own_R = slots_R - self.shift_dev_B[rows_R]
            noise_RV = gumbel_noise(self.seeds_B[rows_R], own_R, self.turn, logits_RV.shape[1])
        tokens_R, confidence_R = choose_tokens(logits_RV, rule, noise_RV)
        if rule.eos_in_order:
            first_R = open_Ab.int().argmax(1)[at_R]
            waits_R = self._is_eos(tokens_R) & (places_R != first_R)
            confidence_R = confidence_R.masked_fill(waits_R, -1.0)  # as if decided: not in this pass
        chosen_Ab = torch.zeros_like(open_Ab, dtype=torch.int64).index_put((at_R, places_R), tokens_R)
        confidence_Ab = torch.zeros_like(open_Ab, dtype=torch.float32).index_put((at_R, places_R), confidence_R)
        return chosen_Ab, confidence_Ab.masked_fill(~open_Ab, -1.0)

    def _forward(self, slots_Q: torch.Tensor) -> torch.Tensor:
        """Hidden states of these slots, [A, Q, H]."""
        self.cache.slots = slots_Q
        shift_A1 = self.shift_dev_B[self.rows_A].unsqueeze(1)
        hidden_AQH: torch.Tensor = self.model.backbone(
            self.tokens_BL[self.rows_A[:, None], slots_Q],
            attention_mask=self._attend(slots_Q, shift_A1),
            position_ids=(slots_Q - shift_A1).clamp(min=0),
            past_key_values=self.cache,
        )
        here = self.tokens_BL.device  # a model over several devices may end on another one
        return hidden_AQH if hidden_AQH.device == here else hidden_AQH.to(here)

    def _attend(self, query_Q: torch.Tensor, shift_A1: torch.Tensor) -> torch.Tensor | None:
        """bool [A, 1, Q, K] over the slots up to the last query; None (faster) where everyone sees everything."""
        block, end = self.rule.block_size, self.cache.length + len(query_Q)
        if self.static:
            end = self.cache.capacity
        elif len(query_Q) == block and not self.shifted and end <= self.whole:
            return None
        key_K = torch.arange(end, device=self.device)
        seen_QK = (query_Q.unsqueeze(1) + self.short) // block >= (key_K + self.short) // block
        real_AK = (key_K >= shift_A1) & (key_K < self.stop_dev_B[self.rows_A].unsqueeze(1))
        own_QK = query_Q.unsqueeze(1) == key_K  # a padding slot attends to itself: an empty softmax is NaN
        return ((seen_QK & real_AK.unsqueeze(1)) | own_QK).unsqueeze(1)

    def _is_eos(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens.unsqueeze(-1) == self.eos).any(-1)

    def _ends(self, start: int, end: int) -> torch.Tensor:
        """Decided end-of-text tokens of the answer in these slots, bool [A, end - start]."""
        return self._ends_of(*self._block(start, end))

    def _open(self, start: int, end: int) -> torch.Tensor:
        """Undecided positions of the rows whose answer can still change in these slots, bool [A, end - start].

        Tokens after an end of text, or after ``max_new_tokens``, are cut off at the end, and decided tokens are final:
        a row needs no further pass once everything before that point is decided.
        """
        return self._open_of(*self._block(start, end))

    def _block(self, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        slots = torch.arange(start, end, device=self.device)
        return self.tokens_BL[self.rows_A, start:end], self.undecided_BL[self.rows_A, start:end], slots

    def _ends_of(self, tokens_Ab: torch.Tensor, undecided_Ab: torch.Tensor, slots_b: torch.Tensor) -> torch.Tensor:
        answer_Ab = slots_b >= self.answer_dev_B[self.rows_A].unsqueeze(1)
        return self._is_eos(tokens_Ab) & answer_Ab & ~undecided_Ab

    def _open_of(self, tokens_Ab: torch.Tensor, undecided_Ab: torch.Tensor, slots_b: torch.Tensor) -> torch.Tensor:
        limit_A = self.answer_dev_B[self.rows_A] + self.rule.max_new_tokens
        ended_Ab = self._ends_of(tokens_Ab, undecided_Ab, slots_b).cumsum(-1) > 0
        kept_Ab = ~ended_Ab & (slots_b < limit_A.unsqueeze(1)) & self.live_A.unsqueeze(1)
        return undecided_Ab & (undecided_Ab & kept_Ab).any(-1, keepdim=True)

    def stop(self, row: int, length: int) -> None:
        """End a row's answer after ``length`` tokens, when a pass has finished its block."""
        self.most_B[row] = length
        self.live_A.logical_and_(self.rows_A != row)

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
            answer = self.tokens_BL[row, begin : begin + self.most_B[row]]
            undecided = self.undecided_BL[row, begin : begin + len(answer)]
            if settled and undecided.any():
                answer = answer[: int(undecided.int().argmax())]
            ends = (torch.isin(answer, self.eos) & ~undecided[: len(answer)]).nonzero()
            answers.append(answer[: int(ends[0, 0]) + 1] if len(ends) else answer)
        return answers

    def orders(self) -> list[torch.Tensor]:
        """Of each token of :meth:`completions`, the pass that decided it (``order_BL``), int64."""
        begins = (self.shift_B + self.prompt_B).tolist()
        each = zip(self.order_BL, begins, self.completions())
        return [order_L[begin : begin + len(answer)] for order_L, begin, answer in each]
