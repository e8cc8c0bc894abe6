"""What each model is shown and which rows are scored, from the definitions, token by token."""

from __future__ import annotations

from typing import Any

Token = tuple[bool, int, int]  # noised copy?, position, token id


def staircase(length: int, block_size: int) -> list[list[bool]]:
    """[2 length][2 length] over [xt ; x0], from the three sentences of the definition."""
    table = []
    for q in range(2 * length):
        row = []
        for k in range(2 * length):
            q_noised, k_noised = q < length, k < length
            q_block, k_block = (q % length) // block_size, (k % length) // block_size
            if q_noised and k_noised:
                row.append(q_block == k_block)
            elif q_noised:
                row.append(k_block < q_block)
            elif k_noised:
                row.append(False)
            else:
                row.append(k_block <= q_block)
        table.append(row)
    return table


def seen(context: str, ids: list[int], masked: list[bool], mask_id: int, block: int, query: Token) -> set[Token]:
    """The tokens that ``query`` attends to, in a layout that is neither packed nor padded."""
    if context == "causal":
        return {(False, k, ids[k]) for k in range(query[1] + 1)}
    noised = [mask_id if is_masked else token for token, is_masked in zip(ids, masked, strict=True)]
    length = len(ids)
    if context == "staircase":
        row = staircase(length, block)[query[1] + (0 if query[0] else length)]
        both = noised + ids
        return {(k < length, k % length, both[k]) for k in range(2 * length) if row[k]}
    visible = set()
    for k in range(length):
        if context == "full" or k // block <= query[1] // block:
            visible.add((False, k, noised[k]))
    return visible


def student_rows(sample: dict[str, Any], masked: list[bool]) -> list[tuple[int, int, int]]:
    """(position, gold, chunk or -1) of each masked token."""
    rows = []
    for i, is_masked in enumerate(masked):
        if is_masked:
            rows.append((i, sample["student_ids"][i], max(sample["student_chunk"][i], -1)))
    return rows


def active_chunks(sample: dict[str, Any], chunk_masked: list[bool], context: str) -> list[int]:
    """The masked chunks; without one that holds a causal teacher's first token, which nothing predicts."""
    first = sample["teacher_chunk"][0] if context == "causal" else -1
    return [c for c in range(sample["chunks"]) if chunk_masked[c] and c != first]


def teacher_rows(sample: dict[str, Any], active: list[int]) -> list[tuple[int, int, int]]:
    """(position, gold, chunk) of each scored token: of an active chunk, and not an EOS after the first."""
    rows = []
    for i, chunk in enumerate(sample["teacher_chunk"]):
        if chunk in active and i <= sample["teacher_content_end"]:
            rows.append((i, sample["teacher_ids"][i], chunk))
    return rows


def pairs(
    student: list[tuple[int, int, int]], teacher: list[tuple[int, int, int]], chunks: int
) -> list[tuple[int, int, int]]:
    """(student position, teacher position, chunk) of the chunks with one row on each side."""
    found = []
    for chunk in range(chunks):
        on_student = [position for position, _, of in student if of == chunk]
        on_teacher = [position for position, _, of in teacher if of == chunk]
        if len(on_student) == 1 and len(on_teacher) == 1:
            found.append((on_student[0], on_teacher[0], chunk))
    return found
