"""Model inputs and scored rows against loops over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.diffusion import (
    ATTENTION_LAYOUTS,
    MASKINGS,
    DistillBatch,
    ModelInput,
    TeacherLayout,
    build_inputs,
    noise,
)
from tests.diffusion import samples
from tests.reference import views as reference

BATCHES = st.lists(samples.samples(), min_size=1, max_size=4)


def _view(items: list[dict[str, Any]], seed: int, context: str = "full", padding: int = 0, **given: Any) -> Any:
    batch = samples.collate(items, padding)
    noised = noise(batch, seed=seed, epoch=0, masking=MASKINGS["expand"], **given)
    teacher = TeacherLayout(ATTENTION_LAYOUTS[context], samples.TEACHER_BLOCK, samples.TEACHER_MASK)
    return noised, build_inputs(
        batch,
        noised,
        student_block=samples.STUDENT_BLOCK,
        student_mask_id=samples.STUDENT_MASK,
        teacher=teacher,
    )


def _check_sight(
    given: ModelInput, row: int, context: str, ids: list[int], masked: list[bool], mask_id: int, block: int
) -> None:
    """Every position of the input sees exactly what it would see in the unpacked, unpadded layout."""
    valid = given.attention.valid[row].nonzero()[:, 0].tolist()
    tokens = {
        place: (
            bool(given.attention.noised[row, place]),
            int(given.position_ids[row, place]),
            int(given.input_ids[row, place]),
        )
        for place in valid
    }
    assert len(set(tokens.values())) == len(valid)
    dense = given.attention.dense()[row, 0]
    for place, token in tokens.items():
        attended = dense[place].nonzero()[:, 0].tolist()
        assert set(attended) <= set(valid), "padding is attended"
        assert {tokens[k] for k in attended} == reference.seen(context, ids, masked, mask_id, block, token)


@settings(deadline=None)
@given(items=BATCHES, seed=st.integers(0, 2**40), padding=st.integers(0, 5))
def test_student_sees_what_it_would_see_in_the_full_layout(
    items: list[dict[str, Any]], seed: int, padding: int
) -> None:
    noised, seen = _view(items, seed, padding=padding)
    for row, item in enumerate(items):
        masked = noised.student_masked[row].tolist()[: len(item["student_ids"])]
        _check_sight(seen.student, row, "staircase", item["student_ids"], masked, samples.STUDENT_MASK, 4)


@pytest.mark.parametrize("context", sorted(ATTENTION_LAYOUTS))
@settings(deadline=None)
@given(items=BATCHES, seed=st.integers(0, 2**40), padding=st.integers(0, 5))
def test_teacher_contexts(context: str, items: list[dict[str, Any]], seed: int, padding: int) -> None:
    noised, seen = _view(items, seed, context, padding)
    for row, item in enumerate(items):
        masked = noised.teacher_masked[row].tolist()[: len(item["teacher_ids"])]
        _check_sight(seen.teacher, row, context, item["teacher_ids"], masked, samples.TEACHER_MASK, 8)


def test_staircase_computes_no_more_than_it_needs() -> None:
    """20 student tokens behind a prompt of 9: xt from block 2 on (12 tokens), x0 without the last block (16)."""
    _, seen = _view([samples.make(0, (9, 0), [(1, 1)] * 10)], 0)
    assert seen.student.input_ids.shape == (1, 12 + 16)
    assert seen.student.position_ids[0].tolist() == [*range(8, 20), *range(16)]
    assert seen.student.attention.noised[0].tolist() == [True] * 12 + [False] * 16


def _where(given: ModelInput, context: str = "staircase") -> list[tuple[int, int]]:
    """(sequence, position) of the token that each row scores; it must be masked, or be behind the row if causal."""
    length = given.input_ids.shape[1]
    found = []
    for row in given.rows.tolist():
        sequence, place = divmod(row, length)
        masked = given.input_ids[sequence, place] in (samples.STUDENT_MASK, samples.TEACHER_MASK)
        assert masked == (context != "causal")
        assert given.attention.valid[sequence, place]
        found.append((sequence, int(given.position_ids[sequence, place]) + (context == "causal")))
    return found


@pytest.mark.parametrize("context", sorted(ATTENTION_LAYOUTS))
@settings(deadline=None)
@given(items=BATCHES, seed=st.integers(0, 2**40), padding=st.integers(0, 5))
def test_rows_equal_reference(context: str, items: list[dict[str, Any]], seed: int, padding: int) -> None:
    noised, seen = _view(items, seed, context, padding)
    students, teachers, chunks, pairs, maskable = [], [], [], [], 0
    for b, item in enumerate(items):
        student = reference.student_rows(item, noised.student_masked[b].tolist()[: len(item["student_ids"])])
        active = reference.active_chunks(item, noised.chunk_masked[b].tolist(), context)
        student = [(i, gold, c if c in active else -1) for i, gold, c in student]
        teacher = reference.teacher_rows(item, active)
        students += [(b, *row) for row in student]
        teachers += [(b, *row) for row in teacher]
        chunks += [(b, c) for c in active]
        pairs += [(b, *pair) for pair in reference.pairs(student, teacher, item["chunks"])]
        maskable += len(item["student_ids"]) - item["student_prompt"]

    assert seen.maskable == maskable
    assert seen.tokens == sum(len(item["student_ids"]) for item in items)
    assert torch.equal(seen.rate, noised.rate.float())
    assert torch.equal(seen.inverse_weight, noised.inverse_weight.float())
    assert seen.chunk_level.tolist() == [b for b, _ in chunks]
    assert _where(seen.student) == [(b, position) for b, position, _, _ in students]
    assert seen.student_level.tolist() == [b for b, *_ in students]
    assert seen.student_targets.tolist() == [gold for _, _, gold, _ in students]
    index = {chunk: k for k, chunk in enumerate(chunks)}
    assert seen.student_chunk.tolist() == [index.get((b, c), -1) for b, _, _, c in students]
    assert _where(seen.teacher, context) == [(b, position) for b, position, _, _ in teachers]
    assert seen.teacher_targets.tolist() == [gold for _, _, gold, _ in teachers]
    assert seen.teacher_chunk.tolist() == [index[b, c] for b, _, _, c in teachers]

    at_student, at_teacher = _where(seen.student), _where(seen.teacher, context)
    found = [
        (*at_student[m], at_teacher[r][1], chunks[k][1])
        for m, r, k in zip(
            seen.pair_student_index.tolist(), seen.pair_teacher_index.tolist(), seen.pair_chunk.tolist(), strict=True
        )
    ]
    assert found == pairs


@pytest.mark.parametrize("student_only", [False, True])
def test_without_a_teacher(student_only: bool) -> None:
    batch = samples.collate(
        [samples.make(key, (2, 3), [(1, 1), (2, 1)], student_only=student_only) for key in range(4)]
    )
    noised = noise(batch, seed=0, epoch=0, masking=MASKINGS["expand"])
    seen = build_inputs(batch, noised, student_block=4, student_mask_id=samples.STUDENT_MASK, teacher=None)
    assert seen.teacher is None
    assert len(seen.student.rows) == noised.student_masked.sum() > 0
    assert set(seen.student_chunk.tolist()) == {-1}
    empty = (seen.teacher_targets, seen.teacher_chunk, seen.chunk_level, seen.pair_chunk, seen.pair_student_index)
    assert [len(each) for each in empty] == [0] * 5
    if student_only:
        teacher = TeacherLayout(ATTENTION_LAYOUTS["full"], 8, samples.TEACHER_MASK)
        with pytest.raises(ValueError, match="has no teacher tokens"):
            build_inputs(batch, noised, student_block=4, student_mask_id=samples.STUDENT_MASK, teacher=teacher)


@pytest.mark.parametrize("context", sorted(ATTENTION_LAYOUTS))
def test_nothing_masked(context: str) -> None:
    items = [samples.make(key, (2, 3), [(1, 1), (2, 1)]) for key in range(3)]
    noised, seen = _view(items, 0, context, t=np.full(3, 1e-12))
    assert not noised.student_masked.any()
    assert [len(each) for each in (seen.student.rows, seen.teacher.rows, seen.chunk_level, seen.pair_chunk)] == [0] * 4
    assert seen.maskable > 0


def test_noised_moves_as_one() -> None:
    _, seen = _view([samples.make(0, (2, 3), [(1, 1), (2, 1)])], 0)
    moved: DistillBatch = seen.to("meta", non_blocking=True)
    assert moved.rate.is_meta
    assert moved.pair_chunk.is_meta
    assert moved.student.rows.is_meta
    assert moved.teacher.attention.valid.is_meta
    assert moved.maskable == seen.maskable
    assert not seen.rate.is_meta
