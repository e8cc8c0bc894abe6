"""How block decoding chooses: the rule, which token a position gets, and which positions a pass decides.

This file is copied into releases next to ``decoding_a2d.py``, so it needs only torch and imports nothing of this
project. Nothing here waits for the device.

Shapes: A batch rows, b positions of a block, R positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

DEFAULT_NEW_TOKENS = 256
BLOCKS_AT_ANSWER = {"sequence": False, "answer": True}  # block layouts: whether the answer begins a block


_FROM_ZERO = (("min_new_tokens", 0), ("top_k", 0))


@dataclass(frozen=True, kw_only=True)
class DecodingRule:
    """How a block is decided.

    Every pass predicts all undecided positions and keeps the ``tokens_per_step`` most confident tokens; the others are
    masked again. With a ``threshold`` (LLaDA2's rule, published with 0.95) tokens with a higher probability are kept
    too. ``least_confident_first`` keeps the least confident ones instead (for experiments). ``temperature`` 0 takes the
    most likely token; above 0, a token is sampled from softmax(logits / temperature): from its ``top_k`` most likely
    tokens (0: all), of these from the fewest that together have a probability of ``top_p``. Confidence is the chosen
    token's probability without any of these. The mask token is never chosen. ``max_new_tokens`` 0 only fills in the
    masks of the prompt.

    End of text fills the blocks behind an answer in training, so a model is often surest of it at the end of a block,
    and an answer may end before its beginning is decided. With ``eos_in_order`` end of text is decided only at the
    first undecided position of a block. It is never chosen for the first ``min_new_tokens`` tokens of an answer.

    ``block_layout``: a key of ``BLOCKS_AT_ANSWER``, see ``decoding_a2d.py``.
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
    top_k: int = 0
    top_p: float = 1.0
    least_confident_first: bool = False
    block_layout: str = "sequence"

    def __post_init__(self) -> None:
        for name, least in (("block_size", 1), ("tokens_per_step", 1), ("max_new_tokens", 0), *_FROM_ZERO):
            value = getattr(self, name)
            if not hasattr(value, "__index__") or value < least:
                raise ValueError(f"generate: {name} is {value!r}; use a whole number, {least} or more")
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise ValueError(f"generate: threshold is {self.threshold}; use a probability from 0 to 1")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"generate: top_p is {self.top_p}; use a probability above 0, to 1")
        if self.block_layout not in BLOCKS_AT_ANSWER:
            raise ValueError(f"generate: block_layout is {self.block_layout!r}; use {' or '.join(BLOCKS_AT_ANSWER)}")
        if self.temperature < 0.0 or not math.isfinite(self.temperature):
            raise ValueError(f"generate: temperature is {self.temperature}; use 0 (greedy) or more")


def gumbel_noise(seed_R: torch.Tensor, place_R: torch.Tensor, turn: torch.Tensor, vocab: int) -> torch.Tensor:
    """Gumbel noise, fp32 [R, V]: a function of a row's seed, a position, the pass and the token, the same on any device
    and in any batch.

    All arguments int64 (``turn`` without dimensions). Each number is hashed from a counter (two rounds of the finaliser
    of MurmurHash3, in wrapping 32-bit arithmetic) to 31 bits.
    """
    key_R = _hashed(_hashed(_hashed(seed_R.int()) + (seed_R >> 32).int()) + place_R.int())
    key_R = _hashed(key_R + turn.int())
    bits_RV = _hashed(torch.arange(vocab, dtype=torch.int32, device=seed_R.device)) ^ key_R.unsqueeze(1)
    share_RV = _hashed(bits_RV).bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)
    return share_RV.neg_().log1p_().neg_().log_().neg_()  # -log(-log u): exact where it is large


def _hashed(x: torch.Tensor) -> torch.Tensor:
    """int32 -> int32, every bit of the result depends on every bit of ``x``."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    x = (x ^ ((x >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return x ^ ((x >> 16) & 0xFFFF)


def choose_tokens(
    logits_RV: torch.Tensor, rule: DecodingRule, noise_RV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and confidence for each position: (int64 [R], fp32 [R]).

    ``noise_RV``: of :func:`gumbel_noise`; None takes the most likely token.
    """
    logits_RV = logits_RV.float()
    logits_RV[:, rule.mask_token_id] = float("-inf")
    # Gumbel-max: a sample from the softmax.
    tokens_R = (logits_RV if noise_RV is None else likely(logits_RV / rule.temperature, rule) + noise_RV).argmax(-1)
    chosen_R = logits_RV.gather(1, tokens_R.unsqueeze(1)).squeeze(1)
    return tokens_R, (chosen_R - logits_RV.logsumexp(-1)).exp()


def likely(logits_RV: torch.Tensor, rule: DecodingRule) -> torch.Tensor:
    """``logits_RV`` without the tokens that ``top_k`` and then ``top_p`` leave out; the most likely one stays."""
    if rule.top_k:
        least_R1 = logits_RV.topk(min(rule.top_k, logits_RV.shape[1])).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < least_R1, float("-inf"))
    if rule.top_p < 1.0:
        sorted_RV, order_RV = logits_RV.sort(descending=True)
        share_RV = sorted_RV.softmax(-1)
        enough_RV = share_RV.cumsum(-1) - share_RV >= rule.top_p  # the tokens before this one suffice
        logits_RV = logits_RV.masked_fill(enough_RV.scatter(1, order_RV, enough_RV), float("-inf"))
    return logits_RV


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
