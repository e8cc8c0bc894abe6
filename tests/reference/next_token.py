"""The losses of strategies ar and joint, one sample at a time, from its whole unpacked input and a mask in words."""

from __future__ import annotations

from typing import Any

import torch


def causal(length: int) -> list[list[bool]]:
    return [[k <= q for k in range(length)] for q in range(length)]


def joint(length: int, block: int) -> list[list[bool]]:
    """[2 length][2 length] over [xt ; x0]: as the staircase, but x0 attends token by token."""
    table = []
    for q in range(2 * length):
        row = []
        for k in range(2 * length):
            q_block, k_block = (q % length) // block, (k % length) // block
            if q < length:
                row.append(q_block == k_block if k < length else k_block < q_block)
            else:
                row.append(k >= length and k <= q)
        table.append(row)
    return table


def predicted(sample: dict[str, Any], score_prompt: bool) -> list[int]:
    """Positions of the tokens that are scored as next tokens."""
    first = 0 if score_prompt else sample["student_prompt"]
    return [p for p in range(len(sample["student_ids"])) if max(first, 1) <= p <= sample["student_content_end"]]


def next_token_terms(model: Any, sample: dict[str, Any], score_prompt: bool) -> list[torch.Tensor]:
    """-log p of each scored token under ``model`` over the clean text alone."""
    ids = sample["student_ids"]
    logits = model(torch.tensor([ids]), torch.tensor(causal(len(ids)))[None, None]).logits[0]
    return [-logits[p - 1].log_softmax(-1)[ids[p]] for p in predicted(sample, score_prompt)]


def denoising_terms(
    model: Any, sample: dict[str, Any], masked: list[bool], inverse_weight: float, block: int, mask_id: int
) -> list[torch.Tensor]:
    """-log p / inverse weight of each masked token of xt, which reads the causal states of x0."""
    ids = sample["student_ids"]
    length = len(ids)
    both = [mask_id if is_masked else token for token, is_masked in zip(ids, masked)] + ids
    place = torch.arange(length).repeat(2)[None]
    logits = model(torch.tensor([both]), torch.tensor(joint(length, block))[None, None], place).logits[0]
    return [-logits[p].log_softmax(-1)[ids[p]] / inverse_weight for p in range(length) if masked[p]]
