"""Block decoding the plain way: one row at a time, no cache, the whole text encoded again for every pass, full head.

``lead``: how many tokens the first block is short of; blocks begin at the answer for ``-len(prompt) % block``.
"""

from __future__ import annotations

from typing import Any

import torch


def block_causal(length: int, block: int, lead: int = 0) -> torch.Tensor:
    """bool [1, 1, L, L]: a position attends to its own block and to every earlier one."""
    mask = torch.zeros(1, 1, length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(length):
            mask[0, 0, query, key] = (lead + key) // block <= (lead + query) // block
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
    least_confident_first: bool = False,
    min_new_tokens: int = 0,
    eos_in_order: bool = False,
    from_answer: bool = False,
    passes: dict[int, int] | None = None,
) -> list[int]:
    """The greedy answer to one prompt, cut after its first end of text.

    ``from_answer``: blocks begin at the answer, and its last one ends with it. ``passes`` is told which pass, from 1,
    decided each place of the answer.
    """
    passes = {} if passes is None else passes
    order = -1 if least_confident_first else 1
    tokens = list(prompt)
    lead = -len(prompt) % block if from_answer else 0
    while len(tokens) < len(prompt) + max_new_tokens:
        start = (lead + len(tokens)) // block * block - lead
        end = min(start + block, len(prompt) + max_new_tokens) if from_answer else start + block
        tokens += [mask_id] * (end - len(tokens))
        undecided = set(range(max(start, len(prompt)), end))
        while undecided:
            number = 1 + max(passes.values(), default=0)
            for position, token in most_confident(
                model, tokens, undecided, block, mask_id, tokens_per_step, threshold, order,
                len(prompt) + min_new_tokens, eos_ids, eos_in_order, lead,
            ):  # fmt: skip
                tokens[position] = token
                undecided.remove(position)
                passes[position - len(prompt)] = number
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
    order: int = 1,
    inside: int = 0,
    never_inside: tuple[int, ...] = (),
    only_first: bool = False,
    lead: int = 0,
) -> list[tuple[int, int]]:
    """(position, token) pairs that one pass decides; ``order`` -1: the least confident ones.

    ``never_inside``: tokens that no position before ``inside`` may take, and with ``only_first`` only the first
    undecided one.
    """
    length = len(tokens)
    logits = model(
        torch.tensor([tokens]),
        attention_mask=block_causal(length, block, lead),
        position_ids=torch.arange(length).unsqueeze(0),
    ).logits[0]
    found = []
    for position in sorted(undecided):
        row = logits[position].clone()
        for token in (mask_id, *(never_inside if position < inside else ())):
            row[token] = float("-inf")
        token = int(row.argmax())
        if only_first and token in never_inside and position > min(undecided):
            continue
        found.append((float(torch.softmax(row, -1)[token]), position, token))
    found.sort(key=lambda item: (-order * item[0], item[1]))
    chosen = found[:tokens_per_step]
    if threshold is not None:
        chosen += [item for item in found[tokens_per_step:] if item[0] > threshold]
    return [(position, token) for _, position, token in chosen]


@torch.no_grad()
def fill_in(
    model: Any,
    prompt: list[int],
    *,
    block: int,
    mask_id: int,
    eos_ids: tuple[int, ...],
    tokens_per_step: int,
    lead: int = 0,
) -> list[int]:
    """The prompt with its mask tokens decided, block after block, each seeing the text up to its own end; no EOS."""
    tokens = list(prompt)
    for start in range(-lead, len(prompt), block):
        inside = range(max(start, 0), min(start + block, len(prompt)))
        undecided = {place for place in inside if prompt[place] == mask_id}
        seen = tokens[: start + block]
        seen += [mask_id] * (start + block - len(seen))
        tail = set(range(len(prompt), start + block)) if undecided else set()
        while undecided:
            both = undecided | tail
            for place, token in most_confident(
                model, seen, both, block, mask_id, tokens_per_step, None, 1, len(prompt), eos_ids, lead=lead
            ):
                seen[place] = token
                undecided.discard(place)
                tail.discard(place)
        tokens[inside.start : inside.stop] = seen[inside.start : len(prompt)]
    return tokens
