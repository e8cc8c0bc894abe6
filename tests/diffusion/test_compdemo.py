"""CompDemo: the split against its definition, and what each of the teacher's two passes is shown."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.diffusion import ATTENTION_LAYOUTS, MASKINGS, CompDemo, TeacherLayout, build_inputs, noise
from tests.diffusion import samples
from tests.reference import noise as reference

VARIANTS = list(product([False, True], [False, True]))


@pytest.mark.parametrize(("exact", "by_token"), VARIANTS)
@settings(deadline=None)
@given(
    items=st.lists(samples.samples(), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
    ratio=st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0]),
)
def test_split_equals_reference(
    exact: bool, by_token: bool, items: list[dict[str, Any]], seed: int, ratio: float
) -> None:
    batch = samples.collate(items, 2)
    noised = noise(batch, seed=seed, epoch=1, masking=MASKINGS["expand"])
    first = CompDemo(ratio, exact, by_token).split(batch, noised, seed, 1)
    for row, item in enumerate(items):
        masked = noised.teacher_masked[row].tolist()[: len(item["teacher_ids"])]
        expected, _ = reference.halves(item, masked, seed, 1, ratio=ratio, exact=exact, by_token=by_token)
        assert set(first[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("by_token", [False, True])
@settings(deadline=None)
@given(items=st.lists(samples.samples(), min_size=1, max_size=4), ratio=st.floats(0, 1))
def test_exact_split_has_its_size(by_token: bool, items: list[dict[str, Any]], ratio: float) -> None:
    batch = samples.collate(items)
    noised = noise(batch, seed=4, epoch=0, masking=MASKINGS["synchronous"])
    first = CompDemo(ratio, True, by_token).split(batch, noised, 4, 0)
    for row, item in enumerate(items):
        content = noised.teacher_masked[row, : item["teacher_content_end"] + 1] & (
            batch.teacher.chunk[row, : item["teacher_content_end"] + 1] >= 0
        )
        chosen = first[row, : item["teacher_content_end"] + 1]
        if by_token:
            assert chosen.sum() == round(ratio * int(content.sum()))
        else:
            chunks = batch.teacher.chunk[row, : item["teacher_content_end"] + 1]
            assert len(chunks[chosen].unique()) == round(ratio * len(chunks[content].unique()))


def test_bernoulli_split_has_its_rate() -> None:
    count, ratio = 3000, 0.3
    batch = samples.collate([samples.make(key, (0, 0), [(1, 2), (2, 1)]) for key in range(count)])
    noised = noise(batch, seed=0, epoch=0, masking=MASKINGS["expand"], t=np.ones(count))
    by_chunk = CompDemo(ratio, False, False).split(batch, noised, 0, 0)
    by_token = CompDemo(ratio, False, True).split(batch, noised, 0, 0)
    bound = 4.5 * (ratio * (1 - ratio) / count) ** 0.5
    assert torch.all((by_chunk.double().mean(0) - ratio).abs() < bound)
    assert torch.all((by_token.double().mean(0) - ratio).abs() < bound)
    assert torch.equal(by_chunk[:, 0], by_chunk[:, 1])  # one chunk, one half
    assert not torch.equal(by_token[:, 0], by_token[:, 1])


@settings(deadline=None)
@given(items=st.lists(samples.samples(), min_size=2, max_size=4), seed=st.integers(0, 100))
def test_split_belongs_to_the_sample(items: list[dict[str, Any]], seed: int) -> None:
    for exact, by_token in VARIANTS:
        demo = CompDemo(0.5, exact, by_token)
        batch = samples.collate(items, 3)
        together = demo.split(batch, noise(batch, seed=seed, epoch=0, masking=MASKINGS["expand"]), seed, 0)
        alone = samples.collate(items[-1:])
        split = demo.split(alone, noise(alone, seed=seed, epoch=0, masking=MASKINGS["expand"]), seed, 0)
        assert torch.equal(together[-1, : split.shape[1]], split[0])


@pytest.mark.parametrize("context", sorted(set(ATTENTION_LAYOUTS) - {"causal"}))
@pytest.mark.parametrize(("exact", "by_token"), VARIANTS)
@settings(deadline=None)
@given(items=st.lists(samples.samples(), min_size=1, max_size=3), seed=st.integers(0, 2**40))
def test_each_row_is_read_where_it_is_masked_and_the_other_half_is_not(
    context: str, exact: bool, by_token: bool, items: list[dict[str, Any]], seed: int
) -> None:
    batch = samples.collate(items)
    noised = noise(batch, seed=seed, epoch=0, masking=MASKINGS["expand"])
    teacher = TeacherLayout(
        ATTENTION_LAYOUTS[context], samples.TEACHER_BLOCK, samples.TEACHER_MASK, CompDemo(0.5, exact, by_token)
    )
    seen = build_inputs(batch, noised, student_block=4, student_mask_id=samples.STUDENT_MASK, teacher=teacher)
    asked, length = seen.teacher, seen.teacher.input_ids.shape[1]
    assert len(asked.input_ids) == 2 * len(items)

    scored: list[set[int]] = [set() for _ in items]
    for row in asked.rows.tolist():
        pass_, sample = divmod(row // length, len(items))
        position = int(asked.position_ids[row // length, row % length])
        scored[sample].add(position)
        masked = noised.teacher_masked[sample].tolist()[: len(items[sample]["teacher_ids"])]
        halves = reference.halves(items[sample], masked, seed, 0, ratio=0.5, exact=exact, by_token=by_token)
        assert position in halves[1 - pass_], "the first pass masks only B, the second only A"

    for sequence in range(2 * len(items)):
        pass_, sample = divmod(sequence, len(items))
        item = items[sample]
        masked = noised.teacher_masked[sample].tolist()[: len(item["teacher_ids"])]
        first, second = reference.halves(item, masked, seed, 0, ratio=0.5, exact=exact, by_token=by_token)
        assert not first & second
        in_chunks = {i for i, is_masked in enumerate(masked) if is_masked and item["teacher_chunk"][i] >= 0}
        assert first | second == in_chunks
        assert scored[sample] == {i for i in in_chunks if i <= item["teacher_content_end"]}
        hidden = (second, first)[pass_] | {i for i, is_masked in enumerate(masked) if is_masked} - in_chunks
        copy = asked.attention.valid[sequence]
        if context == "staircase":
            copy = copy & asked.attention.noised[sequence]
        for token, position in zip(asked.input_ids[sequence][copy], asked.position_ids[sequence][copy], strict=True):
            expected = samples.TEACHER_MASK if int(position) in hidden else item["teacher_ids"][int(position)]
            assert int(token) == expected


def test_bad_ratio() -> None:
    with pytest.raises(ValueError, match="ratio"):
        CompDemo(1.5, True, True)
