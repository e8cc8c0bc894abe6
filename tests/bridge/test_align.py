"""align and align_lengths against the loop-written definition, on drawn texts cut into drawn tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tide.bridge import align, align_batch, align_lengths
from megatron_tide.bridge.align import UNALIGNED, Spelling, align_spans, common_prefix
from tests.reference.align import chunk_ids, spans


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut ``data`` at ``places`` (repeats make tokens without bytes)."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[left:right] for left, right in pairwise(edges)]


PLACES = st.lists(st.integers(0, 200), max_size=30)


@given(st.binary(max_size=60), PLACES, PLACES)
def test_chunks_are_the_definition(data: bytes, left: list[int], right: list[int]) -> None:
    student, teacher = cut(data, left), cut(data, right)
    lengths = [np.array([len(piece) for piece in side], dtype=np.int32) for side in (student, teacher)]
    student_chunk, teacher_chunk, chunks = align_lengths(*lengths)
    assert (student_chunk.tolist(), teacher_chunk.tolist(), chunks) == chunk_ids(*(side.tolist() for side in lengths))
    assert student_chunk.dtype == teacher_chunk.dtype == np.int32
    assert align(student, teacher).tolist() == [list(row) for row in spans(student, teacher)]


@st.composite
def text_lengths(draw: st.DrawFn) -> list[np.ndarray]:
    """Byte lengths of a text's tokens on both sides: tokens, sides and texts without bytes are among them."""
    data = bytes(draw(st.integers(0, 12)))
    sides = [cut(data, draw(PLACES)) if data or draw(st.booleans()) else [] for _ in range(2)]
    return [np.array([len(piece) for piece in side], dtype=np.int64) for side in sides]


@given(st.lists(text_lengths(), max_size=6))
def test_texts_aligned_at_once_are_each_the_definition(texts: list[list[np.ndarray]]) -> None:
    students, teachers = [text[0] for text in texts], [text[1] for text in texts]
    copies = [side.copy() for side in students + teachers]
    batch = align_batch(students, teachers)
    assert len(batch) == len(texts)
    for student, teacher, found in zip(students, teachers, batch):
        for student_chunk, teacher_chunk, chunks in (found, align_lengths(student, teacher)):
            expected = chunk_ids(student.tolist(), teacher.tolist())
            assert (student_chunk.tolist(), teacher_chunk.tolist(), chunks) == expected
            assert student_chunk.dtype == teacher_chunk.dtype == np.int32
    assert all(np.array_equal(side, copy) for side, copy in zip(students + teachers, copies))


@given(st.binary(min_size=1, max_size=60), PLACES, PLACES)
def test_chunks_tile_both_sides_and_none_can_be_split(data: bytes, left: list[int], right: list[int]) -> None:
    student, teacher = cut(data, left), cut(data, right)
    rows = align(student, teacher)
    for first, last, side in ((0, 1, student), (2, 3, teacher)):
        assert rows[0, first] == 0
        assert rows[-1, last] == len(side)
        assert (rows[1:, first] == rows[:-1, last]).all()
    boundaries = set(np.cumsum([len(p) for p in student]).tolist()) & set(np.cumsum([len(p) for p in teacher]).tolist())
    ends = []
    for student_start, student_end, teacher_start, teacher_end in rows.tolist():
        assert b"".join(student[student_start:student_end]) == b"".join(teacher[teacher_start:teacher_end])
        ends.append(len(b"".join(student[:student_end])))
    assert ends == sorted(boundaries - {0})


@given(st.binary(max_size=30), st.binary(max_size=30), st.binary(max_size=30), st.binary(max_size=30), PLACES, PLACES)
def test_an_unequal_middle_is_unaligned_and_the_rest_is_aligned(
    head: bytes, mine: bytes, theirs: bytes, tail: bytes, left: list[int], right: list[int]
) -> None:
    """Both sides have tokens for the same text, but one spells its middle in its own way."""
    size = max(len(mine), len(theirs))
    sides = []
    for middle, places in ((mine, left), (theirs, right)):
        pieces = [*cut(head, places), *([middle] if size else []), *cut(tail, places)]
        read = [*map(len, cut(head, places)), *([size] if size else []), *map(len, cut(tail, places))]
        ends = np.cumsum(read)
        lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
        spans = np.stack([ends - read, ends], axis=1)
        sides.append(Spelling(lengths, b"".join(pieces), spans, np.zeros(len(pieces), bool)))
    total = len(head) + size + len(tail)
    *chunk, chunks, covered = align_spans(sides[0], sides[1], total)
    assert covered == total - (size if mine != theirs else 0)
    for side, ids in zip(sides, chunk):
        ends = np.cumsum(side.lengths)
        spelled = [side.data[end - size : end] for size, end in zip(side.lengths, ends)]
        parts = [b"".join(piece for piece, own in zip(spelled, ids) if own == number) for number in range(chunks)]
        assert all(parts)
        assert b"".join(parts) == (head + mine + tail if mine == theirs else head + tail)
        inside = [number for number in ids.tolist() if number != UNALIGNED]
        assert inside == sorted(inside)


def test_different_bytes_are_refused_with_the_place() -> None:
    with pytest.raises(ValueError, match="from byte 3 on"):
        align([b"abc", b"d"], [b"abc", b"e"])
    with pytest.raises(ValueError, match="4 bytes, the teacher's 5"):
        align_lengths(np.array([4]), np.array([2, 3]))
    # Sums that agree over all texts do not make up for a text whose own do not.
    with pytest.raises(ValueError, match="have 2 bytes, the teacher's 1"):
        align_batch([np.array([3]), np.array([2])], [np.array([3]), np.array([1])])
    with pytest.raises(ValueError, match="have 2 bytes, the teacher's 1"):
        align_batch([np.array([2]), np.array([1])], [np.array([1]), np.array([2])])


def test_nothing_on_both_sides_and_nothing_on_one() -> None:
    assert align([], []).shape == (0, 4)
    assert align([b""], []).tolist() == [[0, 1, 0, 0]]
    assert align_lengths(np.array([], np.int32), np.array([0, 0], np.int32))[2] == 1


@given(st.binary(max_size=20), st.binary(max_size=20))
def test_common_prefix(left: bytes, right: bytes) -> None:
    size = common_prefix(left, right)
    assert left[:size] == right[:size]
    assert left[size : size + 1] != right[size : size + 1] or size == len(left) == len(right)
