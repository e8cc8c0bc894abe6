"""Chunks by definition: two pointers over bytes, one token at a time."""


def chunk_ids(student_lengths: list[int], teacher_lengths: list[int]) -> tuple[list[int], list[int], int]:
    """Chunk id of every token on both sides, and the number of chunks.

    A chunk ends at every byte offset where a token of both sides ends; a token belongs to the chunk its bytes lie in, a
    token without bytes to the chunk that goes on at its place, or to the last one at the very end.
    """
    ends = [_ends(side) for side in (student_lengths, teacher_lengths)]
    common = sorted({end for end in ends[0] if end > 0} & {end for end in ends[1] if end > 0})
    sides = []
    for lengths, side_ends in zip((student_lengths, teacher_lengths), ends):
        ids = []
        for length, end in zip(lengths, side_ends):
            start = end - length
            chunk = 0
            while chunk < len(common) - 1 and common[chunk] <= start:
                chunk += 1
            ids.append(chunk)
        sides.append(ids)
    tokens = len(student_lengths) + len(teacher_lengths)
    return sides[0], sides[1], len(common) if common else int(tokens > 0)


def spans(student_pieces: list[bytes], teacher_pieces: list[bytes]) -> list[tuple[int, int, int, int]]:
    """(student start, student end, teacher start, teacher end) of every chunk; both sides must spell the same bytes."""
    assert b"".join(student_pieces) == b"".join(teacher_pieces)
    student, teacher, chunks = chunk_ids([len(p) for p in student_pieces], [len(p) for p in teacher_pieces])
    found = []
    for chunk in range(chunks):
        row: list[int] = []
        for ids in (student, teacher):
            places = [place for place, number in enumerate(ids) if number == chunk]
            # Only where nothing at all is spelled can a chunk lack tokens on one side.
            row += [places[0], places[-1] + 1] if places else [0, 0]
        found.append((row[0], row[1], row[2], row[3]))
    return found


def _ends(lengths: list[int]) -> list[int]:
    ends, end = [], 0
    for length in lengths:
        end += length
        ends.append(end)
    return ends
