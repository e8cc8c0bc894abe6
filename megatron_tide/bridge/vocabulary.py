"""Two vocabularies side by side: where they are equal id by id, and which ids have the same bytes or begin alike."""

from __future__ import annotations

import numpy as np

from megatron_tide.bridge.byte_table import is_byte_piece
from megatron_tide.bridge.tokenizer import TextTokenizer


def shared_prefix(student: TextTokenizer, teacher: TextTokenizer) -> tuple[int, bool]:
    """Number of leading ids that mean the same on both sides, and whether that takes in all of both own vocabularies.

    An id means the same on both sides if both have the same bytes, or are the same string without bytes. Added
    tokens past the common part may differ, as they do between models of one family; the end-of-response token may not.
    """
    size = min(student.vocab_size, teacher.vocab_size)
    prefix = next((index for index in range(size) if _meaning(student, index) != _meaning(teacher, index)), size)
    last = max(int(np.flatnonzero(side.is_ordinary()).max(initial=-1)) for side in (student, teacher))
    same_end = student.describe()["eos_id"] == teacher.describe()["eos_id"]
    return prefix, last < prefix and same_end


def map_vocabularies(
    student: TextTokenizer, teacher: TextTokenizer, shared: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (student_ids, teacher_ids), int64 [K] each, rising in student ids, no id twice on a side.

    ``shared``: the tokenizers are the same up to this id, so that every id there is its own partner. Otherwise the
    ordinary tokens with the same bytes, and the end-of-response tokens. Of several ids with the same bytes, the
    one that text becomes counts: a piece before a byte-fallback piece, then the lower id.
    """
    if shared is not None:
        ids = np.arange(shared, dtype=np.int64)
        return ids, ids.copy()
    theirs = _by_bytes(teacher)
    pairs = {index: theirs[data] for data, index in _by_bytes(student).items() if data in theirs}
    ends = (student.describe()["eos_id"], teacher.describe()["eos_id"])
    if None not in ends:
        pairs[ends[0]] = ends[1]
    ordered = np.array(sorted(pairs.items()), dtype=np.int64).reshape(-1, 2)
    return np.ascontiguousarray(ordered[:, 0]), np.ascontiguousarray(ordered[:, 1])


def map_prefixes(student: TextTokenizer, teacher: TextTokenizer, shared: int | None) -> np.ndarray:
    """int64 [V_t]: of each teacher id the student id with its bytes, else the longest one that its bytes begin with; -1
    where there is none, as for special tokens (the end-of-response token has the student's).

    ``shared``: the tokenizers are the same up to this id, so that every id there is its own.
    """
    if shared is not None:
        ids = np.arange(teacher.vocab_size, dtype=np.int64)
        return np.where(ids < shared, ids, -1)
    ours, found = _by_bytes(student), np.full(teacher.vocab_size, -1, np.int64)
    longest = max(map(len, ours), default=0)
    for index in np.flatnonzero(teacher.is_ordinary()).tolist():
        data = (teacher.id_to_bytes(index) or b"")[:longest]
        found[index] = next((ours[data[:n]] for n in range(len(data), 0, -1) if data[:n] in ours), -1)
    ends = (student.describe()["eos_id"], teacher.describe()["eos_id"])
    if None not in ends:
        found[ends[1]] = ends[0]
    return found


def spelling(student: TextTokenizer, teacher: TextTokenizer, prefixes: np.ndarray) -> np.ndarray:
    """int8 [V_t] for ``map_prefixes``: 2 where a teacher id is its student id, 1 where that is only how it begins, so
    that the student needs several tokens for it, 0 where it has none.
    """
    kinds = np.zeros(len(prefixes), np.int8)
    for index in np.flatnonzero(prefixes >= 0).tolist():
        data = teacher.id_to_bytes(index)
        kinds[index] = 2 if data is None or data == student.id_to_bytes(int(prefixes[index])) else 1
    return kinds


def _meaning(tokenizer: TextTokenizer, index: int) -> tuple[bytes | None, str | None]:
    data = tokenizer.id_to_bytes(index)
    return data, tokenizer.id_to_token(index) if data is None else None


def _by_bytes(tokenizer: TextTokenizer) -> dict[bytes, int]:
    chosen: dict[bytes, int] = {}
    ordinary = np.flatnonzero(tokenizer.is_ordinary()).tolist()
    fallback = {index: is_byte_piece(tokenizer.id_to_token(index) or "") for index in ordinary}
    for index in sorted(ordinary, key=lambda index: (fallback[index], index)):
        data = tokenizer.id_to_bytes(index)
        if data:
            chosen.setdefault(data, index)
    return chosen
