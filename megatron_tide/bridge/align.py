"""Chunks: the shortest runs of student tokens and teacher tokens that cover the same bytes (TIDE, chunk-level
matching).

Both tokenizations cover the same byte string; a chunk ends wherever a student token and a teacher token end at the
same byte. The common ends are found on cumulative byte lengths, without a loop over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

UNALIGNED = -2
"""Chunk id of a token that no chunk covers."""

TEXTS_AT_ONCE = 16
"""Texts for one call of ``align_batch``: enough to amortise numpy's cost per call, few enough for the CPU caches."""

Chunks = tuple[np.ndarray, np.ndarray, int]
"""One text: chunk ids int32 of the student's tokens and of the teacher's, and the number of chunks."""


def align_lengths(student_len: np.ndarray, teacher_len: np.ndarray) -> Chunks:
    """Chunk ids of both sides from their tokens' byte lengths: ``align_batch`` of one text."""
    return align_batch([student_len], [teacher_len])[0]


def align_batch(student_lens: Sequence[np.ndarray], teacher_lens: Sequence[np.ndarray]) -> list[Chunks]:
    """Chunk ids of both sides of texts from their tokens' byte lengths: a text's are [n_s] and [n_t] integers >= 0 with
    equal sums.

    Returns, per text, ``(student_chunk int32 [n_s], teacher_chunk int32 [n_t], n_chunks)``: ids 0 .. n_chunks - 1, non-
    decreasing, every id on both sides; chunks tile both sides and end exactly at the common byte boundaries. A token of
    length 0 joins the chunk around it, or the last chunk at the very end. If all tokens have length 0, they are one
    chunk. ValueError with both sums if they differ.

    The arrays of a side are views of one array. ``TEXTS_AT_ONCE`` texts per call are fastest.
    """
    assert len(student_lens) == len(teacher_lens), "a text has two sides"
    if not student_lens:
        return []
    # Texts are concatenated: the end of each is a common boundary, so no chunk reaches into the next text.
    student, teacher = _lay(student_lens), _lay(teacher_lens)
    for mine, theirs in zip(pairwise(student.bytes), pairwise(teacher.bytes)):
        student_bytes, teacher_bytes = mine[1] - mine[0], theirs[1] - theirs[0]
        if student_bytes != teacher_bytes:
            raise ValueError(
                f"cannot align: the student's tokens have {student_bytes} bytes, the teacher's {teacher_bytes}"
            )
    # By byte offset: does a token of the student end here, does one of the teacher, do both?
    total = student.bytes[-1]
    common, teacher_ends = np.zeros(total + 1, np.bool_), np.zeros(total + 1, np.bool_)
    common[student.end] = True
    teacher_ends[teacher.end] = True
    common &= teacher_ends
    chunks = [int(np.count_nonzero(common[start + 1 : stop + 1])) for start, stop in pairwise(student.bytes)]
    sides = zip(_chunk_ids(common, student, chunks), _chunk_ids(common, teacher, chunks))
    # Tokens without bytes have no end, yet they form a chunk.
    return [(left, right, count or int(len(left) + len(right) > 0)) for (left, right), count in zip(sides, chunks)]


def align(student_pieces: Sequence[bytes], teacher_pieces: Sequence[bytes]) -> np.ndarray:
    """Align two lists of bytes, one item per token; int64 [C, 4] of (student start, student end, teacher start, teacher
    end).

    For display and tests; data preparation works on ids and byte-length tables (``align_batch``). Rows tile
    both lists in order. ValueError where the joined bytes differ.
    """
    student_bytes, teacher_bytes = b"".join(student_pieces), b"".join(teacher_pieces)
    if student_bytes != teacher_bytes:
        place = common_prefix(student_bytes, teacher_bytes)
        raise ValueError(
            f"cannot align: the two sides have different bytes from byte {place} on: "
            f"{student_bytes[place : place + 16]!r} against {teacher_bytes[place : place + 16]!r}"
        )
    student_len = np.array([len(piece) for piece in student_pieces], dtype=np.int32)
    teacher_len = np.array([len(piece) for piece in teacher_pieces], dtype=np.int32)
    student_chunk, teacher_chunk, chunks = align_lengths(student_len, teacher_len)
    ids = np.arange(chunks)
    sides = (
        np.searchsorted(side, ids, where) for side in (student_chunk, teacher_chunk) for where in ("left", "right")
    )
    return np.stack([*sides], axis=1).astype(np.int64)


class Spelling(NamedTuple):
    """One side's tokens of a text, [n] each: ``lengths`` and, together, ``data`` in bytes; ``spans`` [n, 2], the bytes
    of the text that each stands for, non-decreasing; ``silent``: stands for text that it cannot spell.
    """

    lengths: np.ndarray
    data: bytes
    spans: np.ndarray
    silent: np.ndarray


def align_spans(student: Spelling, teacher: Spelling, size: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Align two sides that spell a text of ``size`` bytes differently in places.

    Between neighbouring places of the text where tokens end on both sides, the sides spell either the same bytes or
    not. Runs of equal stretches (or pairs of them) are aligned as whole texts are; tokens of the others get UNALIGNED.

    Returns ``(student_chunk, teacher_chunk, n_chunks, covered_bytes)``, the last in bytes of the text.
    """
    sides = (student, teacher)
    cuts = [_cuts(side.spans, size) for side in sides]
    places = np.flatnonzero((cuts[0] >= 0) & (cuts[1] >= 0))
    tokens = [cut[places].tolist() for cut in cuts]
    starts = [np.concatenate([[0], np.cumsum(side.lengths)])[at].tolist() for side, at in zip(sides, tokens)]
    mute = [np.concatenate([[0], np.cumsum(side.silent)])[at].tolist() for side, at in zip(sides, tokens)]

    def alike(first: int, last: int) -> bool:
        mine, theirs = (side.data[at[first] : at[last]] for side, at in zip(sides, starts))
        return mine == theirs != b"" and all(count[first] == count[last] for count in mute)

    runs: list[list[int]] = []
    n = covered = 0
    while n < len(places) - 1:
        # Two stretches at once where one side gives a space to the word behind it, though it does not stand for it.
        last = next((stop for stop in range(n + 1, min(n + 3, len(places))) if alike(n, stop)), 0)
        if last and runs and runs[-1][1] == n:
            runs[-1][1] = last
        elif last:
            runs.append([n, last])
        covered += int(places[last] - places[n]) if last else 0
        n = last or n + 1
    parts = [[slice(at[first], at[last]) for first, last in runs] for at in tokens]
    found = align_batch(*([side.lengths[part] for part in own] for side, own in zip(sides, parts)))
    ids = [np.full(len(side.lengths), UNALIGNED, dtype=np.int32) for side in sides]
    chunks = 0
    for left, right, (left_ids, right_ids, count) in zip(*parts, found):
        ids[0][left], ids[1][right] = left_ids + chunks, right_ids + chunks
        chunks += count
    return ids[0], ids[1], chunks, covered


def _cuts(spans: np.ndarray, size: int) -> np.ndarray:
    """int64 [size + 1]: for each place of the text, the number of tokens before it; -1 inside a token."""
    starts, ends = spans.T
    places = np.arange(size + 1)
    # A token of no bytes of the text begins one that follows (the first bytes of a letter).
    before = np.searchsorted(starts, places)
    cuts = np.where(np.concatenate([[0], ends])[before] <= places, before, -1)
    cuts[-1] = len(starts)
    return cuts


def common_prefix(left: bytes, right: bytes) -> int:
    """Number of leading bytes that both share."""
    size = min(len(left), len(right))
    unequal = np.frombuffer(left, np.uint8, size) != np.frombuffer(right, np.uint8, size)
    return int(unequal.argmax()) if unequal.any() else size


class _Side(NamedTuple):
    """One side of T texts, end to end: ``length`` and ``end`` [n] of each token, in bytes; ``tokens`` and ``bytes``
    [T + 1], where each text starts and the last one ends.
    """

    length: np.ndarray
    end: np.ndarray
    tokens: list[int]
    bytes: list[int]


def _lay(lengths: Sequence[np.ndarray]) -> _Side:
    length = np.concatenate(lengths)
    end = np.add.accumulate(length, dtype=np.int64)
    tokens = [0, *accumulate(map(len, lengths))]
    return _Side(length, end, tokens, [int(end[stop - 1]) if stop else 0 for stop in tokens])


def _chunk_ids(common: np.ndarray, side: _Side, chunks: list[int]) -> list[np.ndarray]:
    """Chunk id of each token, text by text: the number of its text's ``chunks`` [T] that end before it."""
    closes = common[side.end]
    plain = np.count_nonzero(closes) == sum(chunks)
    if not plain:
        # A token of length 0 at a boundary ended the chunk once more; only tokens with bytes may.
        closes &= side.length > 0
    ids = np.zeros(len(closes), np.int32)
    ids[1:] = closes[:-1]
    for start, count in zip(side.tokens[1:], chunks):
        if start < len(ids):
            ids[start] -= count  # every text counts from 0
    np.add.accumulate(ids, out=ids)
    if not plain:
        # Tokens of length 0 after a text's last chunk belong to it.
        last = np.maximum(np.array(chunks, np.int32) - 1, 0)
        np.minimum(ids, np.repeat(last, np.diff(side.tokens)), out=ids)
    return [ids[start:stop] for start, stop in pairwise(side.tokens)]
