"""Noise and CompDemo splits, one sample and one token at a time, from the definition of the draws on."""

from __future__ import annotations

import hashlib
from typing import Any

_WORD = (1 << 64) - 1


def philox_words(key: tuple[int, int], count: int) -> list[int]:
    """The first words of Philox4x64-10 (Salmon et al., 2011) in Python integers; the first block has counter 1."""
    words: list[int] = []
    block = 1
    while len(words) < count:
        c0, c1, c2, c3 = block, 0, 0, 0
        k0, k1 = key
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 1 << 64)
            high1, low1 = divmod(0xCA5A826395121157 * c2, 1 << 64)
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _WORD, (k1 + 0xBB67AE8584CAA73B) & _WORD
        words += [c0, c1, c2, c3]
        block += 1
    return words[:count]


def draws(seed: int, epoch: int, key: int, stream: str, count: int) -> list[float]:
    """Uniforms in (0, 1) of one sample: the top 52 bits of each word and a half, over 2^52."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=16, person=stream.encode()).digest()
    halves = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    return [((word >> 12) + 0.5) / 2**52 for word in philox_words(halves, count)]


def masks(
    sample: dict[str, Any], seed: int, epoch: int, kind: str, eps: float, t: float | None = None
) -> tuple[float, list[bool], list[bool] | None, list[bool]]:
    """(t, student masked, teacher masked or None, chunks masked) of a sample as tests/diffusion/samples.py makes it."""
    chunk_of = sample["student_chunk"]
    prompt = sample["student_prompt"]
    first, *token_draws = draws(seed, epoch, sample["key"], "noise", 1 + len(chunk_of) - prompt)
    rate = eps + (1 - eps) * first if t is None else t

    chunk_masked = []
    for chunk in range(sample["chunks"]):
        of_chunk = [token_draws[i - prompt] for i in range(prompt, len(chunk_of)) if chunk_of[i] == chunk]
        if kind == "expand":
            chunk_masked.append(any(draw < rate for draw in of_chunk))
        else:
            chunk_masked.append(of_chunk[0] < rate)

    student_masked = []
    for i, chunk in enumerate(chunk_of):
        if i < prompt:
            student_masked.append(False)
        elif chunk >= 0:
            student_masked.append(chunk_masked[chunk])
        else:
            student_masked.append(token_draws[i - prompt] < rate)

    if "teacher_chunk" not in sample:
        return rate, student_masked, None, chunk_masked
    teacher_masked = []
    for i, chunk in enumerate(sample["teacher_chunk"]):
        if i < sample["teacher_prompt"]:
            teacher_masked.append(False)
        else:
            teacher_masked.append(chunk < 0 or chunk_masked[chunk])
    return rate, student_masked, teacher_masked, chunk_masked


def halves(
    sample: dict[str, Any],
    teacher_masked: list[bool],
    seed: int,
    epoch: int,
    *,
    ratio: float,
    exact: bool,
    by_token: bool,
) -> tuple[set[int], set[int]]:
    """Positions of the teacher's tokens in A and in B."""
    chunk_of = sample["teacher_chunk"]
    unit_of: dict[int, int] = {}
    for i, chunk in enumerate(chunk_of):
        if teacher_masked[i] and chunk >= 0:
            unit_of[i] = min(i, sample["teacher_content_end"]) - sample["teacher_prompt"] if by_token else chunk
    units = sorted(set(unit_of.values()))
    coin = draws(seed, epoch, sample["key"], "compdemo", max(units, default=-1) + 1)
    if exact:
        chosen = set(sorted(units, key=lambda unit: coin[unit])[: round(ratio * len(units))])
    else:
        chosen = {unit for unit in units if coin[unit] < ratio}
    first = {i for i, unit in unit_of.items() if unit in chosen}
    return first, set(unit_of) - first
