"""Masks of the student's own text in the order it was written: the definition, and no pass is favoured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.diffusion import MASKINGS, NoiseSampling, noise
from megatron_tide.diffusion.levels import Levels
from tests.diffusion import samples
from tests.reference import noise as reference

BLOCK = samples.STUDENT_BLOCK
KINDS = sorted(MASKINGS)


def draw(items: list[dict[str, Any]], orders: list[list[int] | None], kind: str, padding: int = 0, **flags: Any) -> Any:
    """Noise of samples, of which those with an order are the student's own."""
    batch = samples.collate(items, padding)
    order_BS = torch.zeros(batch.student.ids.shape, dtype=torch.int32)
    for row, (item, order) in enumerate(zip(items, orders)):
        if order is not None:
            order_BS[row, item["student_prompt"] : len(item["student_ids"])] = torch.tensor(order, dtype=torch.int32)
    sampling = NoiseSampling(per_block=True, own_order=True, **flags)
    batch = replace(batch, order=order_BS)
    return lambda **given: noise(batch, epoch=0, masking=MASKINGS[kind], sampling=sampling, block=BLOCK, **given)


def uniforms(item: dict[str, Any], seed: int) -> list[float]:
    first, last = item["student_prompt"] // BLOCK, (len(item["student_ids"]) - 1) // BLOCK
    return reference.draws(seed, 0, item["key"], "timesteps", last - first + 1)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(
    items=st.lists(samples.samples(), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
    padding=st.integers(0, 9),
    chance=st.randoms(use_true_random=False),
)
def test_equals_reference(
    kind: str, exact: bool, items: list[dict[str, Any]], seed: int, padding: int, chance: Any
) -> None:
    """Own text has its decoder's masks, whatever the masking; all other text has the masks of before."""
    orders: list[list[int] | None] = []
    for item in items:
        tokens = len(item["student_ids"]) - item["student_prompt"]
        orders.append([chance.randint(1, 9) for _ in range(tokens)] if chance.random() < 0.6 else None)
    drawn = draw(items, orders, kind, padding, exact=exact)(seed=seed)
    plain = noise(
        samples.collate(items, padding),
        seed=seed,
        epoch=0,
        masking=MASKINGS[kind],
        sampling=NoiseSampling(per_block=True, exact=exact),
        block=BLOCK,
    )
    for name in ("student_level", "chunk_level", "level_sample"):
        assert torch.equal(getattr(drawn, name), getattr(plain, name))
    for row, (item, order) in enumerate(zip(items, orders)):
        levels_N = drawn.level_sample == row
        if order is None:
            for name in ("student_masked", "teacher_masked", "chunk_masked"):
                assert torch.equal(getattr(drawn, name)[row], getattr(plain, name)[row])
            assert torch.equal(drawn.rate[levels_N], plain.rate[levels_N])
            assert torch.equal(drawn.inverse_weight[levels_N], plain.inverse_weight[levels_N])
            continue
        shares, _, masks = reference.undecided(item, order, BLOCK, uniforms(item, seed))
        length = len(item["student_ids"])
        assert drawn.student_masked[row].tolist() == masks[0] + [False] * (drawn.student_masked.shape[1] - length)
        assert drawn.teacher_masked[row, : len(item["teacher_ids"])].tolist() == masks[1]
        assert drawn.chunk_masked[row, : item["chunks"]].tolist() == masks[2]
        for found_N in (drawn.rate[levels_N], drawn.inverse_weight[levels_N]):
            assert found_N.tolist() == pytest.approx([shares[level] for level in sorted(shares)])
            assert 0 < found_N.min() <= found_N.max() <= 1


# Two blocks of one token a chunk, and EOS: the second block was written in two passes.
ITEM = samples.make(1, (4, 2), [(1, 1)] * 7)
ORDER = [3, 1, 2, 4, 5, 6, 5, 6]


def test_every_state_of_a_block_is_drawn_equally_often_and_is_the_decoders() -> None:
    """For evenly spaced numbers in place of random ones, exactly; for the random ones, within three standard errors."""
    run = draw([ITEM], [ORDER], "synchronous")
    states = {tuple(order >= k for order in ORDER[:4]) for k in (1, 2, 3, 4)}
    found = Counter[tuple[bool, ...]]()
    with pytest.MonkeyPatch.context() as patch:
        for number in range(8):
            even = torch.full((2,), (number + 0.5) / 8, dtype=torch.float64)
            patch.setattr(Levels, "uniforms", lambda *_, even=even: even)
            found[tuple(run(seed=0).student_masked[0, 4:8].tolist())] += 1
    assert found == dict.fromkeys(states, 2)
    masked_DS = np.stack([run(seed=seed).student_masked[0, 4:12].numpy() for seed in range(2000)])
    passes = [(order - 0) / 4 for order in ORDER[:4]] + [(order - 4) / 2 for order in ORDER[4:]]
    error_S = 3 * np.sqrt(np.array(passes) * (1 - np.array(passes)) / len(masked_DS))
    assert (np.abs(masked_DS.mean(0) - passes) <= error_S).all()


def test_the_mean_of_any_loss_is_that_over_all_states() -> None:
    """A made-up loss of masked tokens, which depends on what else is masked in their block, over the share masked."""

    def loss(masked: np.ndarray, rate: float) -> float:
        return float((masked * (1 + np.arange(4)) * (1 + (masked.sum() - masked) ** 1.5)).sum() / rate)

    run, drawn = draw([ITEM], [ORDER], "expand", stratified=True), []
    for seed in range(2000):
        one = run(seed=seed)
        masked_JS, rates = one.student_masked[0, 4:12].view(2, 4).double().numpy(), one.inverse_weight.tolist()
        drawn.append(sum(map(loss, masked_JS, rates)))
    exact = 0.0
    for first in (0, 4):
        order = np.array(ORDER[first : first + 4])
        states = [(order >= k).astype(float) for k in range(order.min(), order.max() + 1)]
        exact += float(np.mean([loss(state, state.mean()) for state in states]))
    assert abs(np.mean(drawn) - exact) <= 3 * np.std(drawn) / np.sqrt(len(drawn))


def test_a_chunk_with_an_undecided_token_is_masked() -> None:
    item = samples.make(2, (4, 2), [(2, 1), (1, 2), (1, 1), (3, 1)])
    drawn = draw([item], [[1, 4, 2, 3, *range(5, 9)]], "synchronous")
    masks = {tuple(drawn(seed=seed).student_masked[0, 4:8].tolist()) for seed in range(40)}
    assert masks == {(True, True, *rest) for rest in ((True, True), (False, True), (False, False))}


def test_it_is_a_state_of_each_block() -> None:
    with pytest.raises(AssertionError, match="one of each block"):
        NoiseSampling(own_order=True)
