"""Block decoding the plain way: one row at a time, no cache, the whole text encoded again for every pass, full head."""

from __future__ import annotations

from typing import Any

import torch


def block_causal(length: int, block: int) -> torch.Tensor:
    """bool [1, 1, L, L]: a position attends to its own block and to every earlier one."""
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            mask[0, 0, query, key] = key // block <= query // block
    return mask


@torch.no_grad()
def generate(
    model: Any,
    prompt: list[int],
    *,
    block: int,
    mask_id: int,
    eos_ids: tuple[int, ...],
    max_new_tokens: int,
    tokens_per_step: int,
    threshold: float | None,
) -> list[int]:
    """The greedy answer to one prompt, cut after its first end of text."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        start = len(tokens) // block * block
        tokens += [mask_id] * (start + block - len(tokens))
        undecided = set(range(max(start, len(prompt)), start + block))
        while undecided:
            for position, token in most_confident(model, tokens, undecided, block, mask_id, tokens_per_step, threshold):
                tokens[position] = token
                undecided.remove(position)
        if any(token in eos_ids for token in tokens[max(start, len(prompt)) :]):
            break
    answer = tokens[len(prompt) :][:max_new_tokens]
    for i, token in enumerate(answer):
        if token in eos_ids:
            return answer[: i + 1]
    return answer


def most_confident(
    model: Any,
    tokens: list[int],
    undecided: set[int],
    block: int,
    mask_id: int,
    tokens_per_step: int,
    threshold: float | None,
) -> list[tuple[int, int]]:
    """(position, token) pairs that one pass decides."""
    length = len(tokens)
    logits = model(
        torch.tensor([tokens]),
        attention_mask=block_causal(length, block),
        position_ids=torch.arange(length).unsqueeze(0),
    ).logits[0]
    found = []
    for position in sorted(undecided):
        row = logits[position].clone()
        row[mask_id] = float("-inf")
        token = int(row.argmax())
        found.append((float(torch.softmax(row, -1)[token]), position, token))
    found.sort(key=lambda item: (-item[0], item[1]))
    chosen = found[:tokens_per_step]
    if threshold is not None:
        chosen += [item for item in found[tokens_per_step:] if item[0] > threshold]
    return [(position, token) for _, position, token in chosen]
