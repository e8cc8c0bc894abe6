"""Chunks: the shortest runs of student tokens and teacher tokens that spell the same bytes (TIDE, chunk-level
matching).

Both sides spell one string of bytes; a chunk ends wherever a student token and a teacher token end at the same byte.
The common ends are found on cumulative byte lengths, so no token is ever compared with another and nothing loops over
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNCOVERED = -2
"""Chunk id of a token that no chunk covers."""


def align_lengths(student_len: np.ndarray, teacher_len: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Chunk ids of both sides from their tokens' byte lengths, [n_s] and [n_t] integers >= 0 with equal sums.

    Returns ``(student_chunk int32 [n_s], teacher_chunk int32 [n_t], n_chunks)``: ids 0 .. n_chunks - 1, never falling,
    every id on both sides; chunks tile both sides and end exactly at the common byte boundaries. A token of length 0
    joins the chunk that goes on at its place, or the last chunk at the very end. Where nothing is spelled, but tokens
    exist, all of them are one chunk. ValueError where the sums differ.
    """
    student_end = np.add.accumulate(student_len, dtype=np.int64)
    teacher_end = np.add.accumulate(teacher_len, dtype=np.int64)
    total = int(student_end[-1]) if len(student_end) else 0
    teacher_total = int(teacher_end[-1]) if len(teacher_end) else 0
    if total != teacher_total:
        raise ValueError(f"cannot align: the student's tokens spell {total} bytes, the teacher's {teacher_total}")
    if total == 0:
        chunks = int(len(student_end) + len(teacher_end) > 0)
        return np.zeros(len(student_end), np.int32), np.zeros(len(teacher_end), np.int32), chunks
    # By byte offset: does a token of the student end here, does one of the teacher, do both?
    common, teacher_ends = np.zeros(total + 1, np.bool_), np.zeros(total + 1, np.bool_)
    common[student_end] = True
    teacher_ends[teacher_end] = True
    common &= teacher_ends
    common[0] = False
    chunks = int(np.count_nonzero(common))
    student_chunk = _chunk_ids(common[student_end], student_len, chunks)
    teacher_chunk = _chunk_ids(common[teacher_end], teacher_len, chunks)
    return student_chunk, teacher_chunk, chunks


def align(student_pieces: Sequence[bytes], teacher_pieces: Sequence[bytes]) -> np.ndarray:
    """Align two lists of bytes, one item a token; int64 [C, 4] of (student start, student end, teacher start, teacher
    end).

    The form for people and checks; data preparation works on ids and byte-length tables (``align_lengths``). Rows tile
    both lists in order. ValueError where the joined bytes differ.
    """
    student_bytes, teacher_bytes = b"".join(student_pieces), b"".join(teacher_pieces)
    if student_bytes != teacher_bytes:
        place = common_prefix(student_bytes, teacher_bytes)
        raise ValueError(
            f"cannot align: the two sides spell different bytes from byte {place} on: "
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


def align_ends(
    student_len: np.ndarray, teacher_len: np.ndarray, head: int, tail: int
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Align two sides that agree on their first ``head`` and last ``tail`` bytes only.

    Returns ``(student_chunk, teacher_chunk, n_chunks, covered_bytes)``; tokens between the last common boundary of the
    head and the first one of the tail get UNCOVERED. ``head + tail`` may exceed neither side's sum.
    """
    ends = [np.cumsum(side, dtype=np.int64) for side in (student_len, teacher_len)]
    totals = [int(end[-1]) if len(end) else 0 for end in ends]
    assert head + tail <= min(totals), "head and tail overlap"
    heads = np.intersect1d(ends[0], ends[1])
    stop = int(heads[(heads <= head)].max(initial=0))
    lefts = np.intersect1d(totals[0] - (ends[0] - student_len), totals[1] - (ends[1] - teacher_len))
    rest = int(lefts[lefts <= tail].max(initial=0))
    # The first token that reaches the head's last boundary closes it, and the last one that starts where the tail
    # starts opens it: tokens of no bytes beside the disagreement stand for what their tokenizer could not spell.
    first = [int(np.searchsorted(end, stop)) + 1 if stop else 0 for end in ends]
    last = [
        int(np.searchsorted(end - side, total - rest, "right")) - 1 if rest else len(end)
        for end, side, total in zip(ends, (student_len, teacher_len), totals)
    ]
    sides = [np.full(len(end), UNCOVERED, dtype=np.int32) for end in ends]
    chunks = 0
    for spans in ([slice(0, stop_at) for stop_at in first], [slice(start_at, None) for start_at in last]):
        *found, count = align_lengths(student_len[spans[0]], teacher_len[spans[1]])
        for side, span, ids in zip(sides, spans, found):
            side[span] = ids + chunks
        chunks += count
    return sides[0], sides[1], chunks, stop + rest


def common_prefix(left: bytes, right: bytes) -> int:
    """Number of leading bytes that both share."""
    size = min(len(left), len(right))
    unequal = np.frombuffer(left, np.uint8, size) != np.frombuffer(right, np.uint8, size)
    return int(unequal.argmax()) if unequal.any() else size


def _chunk_ids(closes: np.ndarray, lengths: np.ndarray, chunks: int) -> np.ndarray:
    step = closes.astype(np.int32)
    ids = np.add.accumulate(step, dtype=np.int32)
    if ids[-1] != chunks:
        # A token of length 0 at a boundary ended the chunk once more; only tokens with bytes may.
        step *= lengths > 0
        return np.minimum(np.add.accumulate(step, dtype=np.int32) - step, np.int32(chunks - 1))
    ids -= step
    return ids
