"""Noise and CompDemo splits, one sample and one token at a time, from the definition of the draws on."""

from __future__ import annotations

import hashlib
import math
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
    first, *token_draws = _all_draws(sample, seed, epoch)
    rate = eps + (1 - eps) * first if t is None else t
    return rate, *_masked(sample, kind, [draw < rate for draw in token_draws])


def _all_draws(sample: dict[str, Any], seed: int, epoch: int) -> list[float]:
    return draws(seed, epoch, sample["key"], "noise", 1 + len(sample["student_chunk"]) - sample["student_prompt"])


def _masked(sample: dict[str, Any], kind: str, drawn: list[bool]) -> tuple[list[bool], list[bool] | None, list[bool]]:
    """Both sides' masks and the chunks', where ``drawn`` says which response tokens' numbers are below the rate."""
    chunk_of = sample["student_chunk"]
    prompt = sample["student_prompt"]
    chunk_masked = []
    for chunk in range(sample["chunks"]):
        of_chunk = [drawn[i - prompt] for i in range(prompt, len(chunk_of)) if chunk_of[i] == chunk]
        chunk_masked.append(any(of_chunk) if kind == "expand" else of_chunk[0])

    student_masked = []
    for i, chunk in enumerate(chunk_of):
        if i < prompt:
            student_masked.append(False)
        elif chunk >= 0:
            student_masked.append(chunk_masked[chunk])
        else:
            student_masked.append(drawn[i - prompt])

    if "teacher_chunk" not in sample:
        return student_masked, None, chunk_masked
    teacher_masked = []
    for i, chunk in enumerate(sample["teacher_chunk"]):
        if i < sample["teacher_prompt"]:
            teacher_masked.append(False)
        else:
            teacher_masked.append(chunk < 0 or chunk_masked[chunk])
    return student_masked, teacher_masked, chunk_masked


def level_of_tokens(sample: dict[str, Any], block: int | None) -> list[int]:
    """Of each response token, the block (from the response's first one) that its chunk starts in; None: one level."""
    chunk_of, prompt, levels = sample["student_chunk"], sample["student_prompt"], []
    for i in range(prompt, len(chunk_of)):
        start = chunk_of.index(chunk_of[i]) if chunk_of[i] >= 0 else i
        levels.append(0 if block is None else start // block - prompt // block)
    return levels


def sampled(
    sample: dict[str, Any],
    seed: int,
    epoch: int,
    kind: str,
    *,
    block: int | None,
    stratified: bool,
    exact: bool,
    stratum: int = 0,
    strata: int = 1,
    eps: float = 1e-3,
    uniforms: list[float] | None = None,
) -> tuple[dict[int, tuple[float, float]], list[int], tuple[list[bool], list[bool] | None, list[bool]]]:
    """((rate, inverse weight) of each level, level of each response token, masks as of :func:`masks`), linear schedule.

    ``block``: tokens that share a timestep; None: all of the sample. ``uniforms``: those of the blocks' timesteps.
    """
    own, *token_draws = _all_draws(sample, seed, epoch)
    length, prompt, chunk_of = len(sample["student_chunk"]), sample["student_prompt"], sample["student_chunk"]
    levels = level_of_tokens(sample, block)
    if stratified:
        own = (stratum + own) / strata
    blocks = 1 if block is None else (length - 1) // block - prompt // block + 1
    of_block = [own] if block is None else draws(seed, epoch, sample["key"], "timesteps", blocks)
    if block is not None and stratified:
        of_block = [(sorted(of_block).index(number) + own) / blocks for number in of_block]
    of_block = uniforms or of_block
    rates, drawn = {}, [False] * len(levels)
    for level in sorted(set(levels)):
        tokens = [i for i, mine in enumerate(levels) if mine == level]
        if not exact:
            t = eps + (1 - eps) * of_block[level]
            rates[level] = t, t
            for i in tokens:
                drawn[i] = token_draws[i] < t
            continue
        if kind == "expand":
            units = tokens
        else:
            whole = chunk_of[prompt:]
            units = [i for i in tokens if whole[i] < 0 or whole.index(whole[i]) == i]
        k = min(len(units), 1 + int(of_block[level] * len(units)))
        rates[level] = k / len(units), k / len(units)
        for i in sorted(units, key=lambda unit: token_draws[unit])[:k]:
            drawn[i] = True
    return rates, levels, _masked(sample, kind, drawn)


def undecided(
    sample: dict[str, Any], order: list[int], block: int, uniforms: list[float]
) -> tuple[dict[int, float], list[int], tuple[list[bool], list[bool] | None, list[bool]]]:
    """As :func:`sampled` of text that the student wrote: (share masked of each level, levels, masks). ``order``: the
    pass that decided each response token; ``uniforms``: of the blocks, which of their passes is to come.
    """
    length, prompt, levels = len(sample["student_chunk"]), sample["student_prompt"], level_of_tokens(sample, block)
    drawn = [False] * len(levels)
    for level in set(levels):
        own = [i for i, mine in enumerate(levels) if mine == level and (prompt + i) // block == level + prompt // block]
        passes = range(min(order[i] for i in own), max(order[i] for i in own) + 1)
        to_come = max(1, math.ceil(uniforms[level] * len(passes)))
        for i in own:
            drawn[i] = order[i] in passes[len(passes) - to_come :]
    masks = _masked(sample, "expand", drawn)
    masked = masks[0][prompt:length]
    shares = {
        level: sum(is_masked for is_masked, mine in zip(masked, levels) if mine == level) / levels.count(level)
        for level in set(levels)
    }
    return shares, levels, masks


def halves(
    sample: dict[str, Any],
    teacher_masked: list[bool],
    seed: int,
    epoch: int,
    *,
    ratio: float,
    exact: bool,
    by_token: bool,
    block: int | None = None,
) -> tuple[set[int], set[int]]:
    """Positions of the teacher's tokens in A and in B; ``block``: tokens that share a timestep (None: all)."""
    chunk_of = sample["teacher_chunk"]
    unit_of: dict[int, int] = {}
    for i, chunk in enumerate(chunk_of):
        if teacher_masked[i] and chunk >= 0:
            unit_of[i] = min(i, sample["teacher_content_end"]) - sample["teacher_prompt"] if by_token else chunk
    units = sorted(set(unit_of.values()))
    coin = draws(seed, epoch, sample["key"], "compdemo", max(units, default=-1) + 1)
    if exact:
        levels, chosen = level_of_tokens(sample, block), set()
        of_chunk = dict(zip(sample["student_chunk"][sample["student_prompt"] :], levels))
        level_of = {unit: of_chunk[chunk_of[i]] for i, unit in unit_of.items()}
        for level in set(level_of.values()):
            mine = sorted((unit for unit in units if level_of[unit] == level), key=lambda unit: coin[unit])
            chosen |= set(mine[: round(ratio * len(mine))])
    else:
        chosen = {unit for unit in units if coin[unit] < ratio}
    first = {i for i, unit in unit_of.items() if unit in chosen}
    return first, set(unit_of) - first
