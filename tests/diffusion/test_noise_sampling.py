"""Timesteps per block, stratified timesteps and exact counts: the definition, no bias, and what a level is."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.data.sampler import permutation
from megatron_tide.diffusion import MASKINGS, CompDemo, NoiseSampling, noise
from megatron_tide.diffusion.noise_schedule import Linear
from tests.diffusion import samples
from tests.diffusion.test_noise_schedule import Square
from tests.reference import noise as reference

KINDS = sorted(MASKINGS)
FORMS = [
    NoiseSampling(per_block=block, stratified=even, exact=exact)
    for block, even, exact in product([False, True], [False, True], [False, True])
]
BLOCK = samples.STUDENT_BLOCK


def _name(form: NoiseSampling) -> str:
    return "+".join(name for name in ("per_block", "stratified", "exact") if getattr(form, name)) or "published"


every_form = pytest.mark.parametrize("form", FORMS, ids=_name)
every_kind = pytest.mark.parametrize("kind", KINDS)


def _draw(items: list[dict[str, Any]], form: NoiseSampling, kind: str, padding: int = 0, **given: Any) -> Any:
    given = {"seed": 0, "epoch": 0, **given}
    return noise(samples.collate(items, padding), masking=MASKINGS[kind], sampling=form, block=BLOCK, **given)


@every_form
@every_kind
@settings(deadline=None, max_examples=25)
@given(
    items=st.lists(samples.samples(), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
    padding=st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
def test_equals_reference(
    form: NoiseSampling, kind: str, items: list[dict[str, Any]], seed: int, padding: int, order: Any
) -> None:
    """Rates, weights, levels and masks; a level for each block with a token to mask, and none for any padding."""
    strata = order.sample(range(7), len(items))
    drawn = _draw(items, form, kind, padding, seed=seed, epoch=2, strata=(np.array(strata), 7))
    expected_levels = []
    for row, item in enumerate(items):
        rates, level_of, masks = reference.sampled(
            item,
            seed,
            2,
            kind,
            block=BLOCK if form.per_block else None,
            stratified=form.stratified,
            exact=form.exact,
            stratum=strata[row],
            strata=7,
        )
        number = {level: len(expected_levels) + i for i, level in enumerate(sorted(rates))}
        expected_levels += [(row, *rates[level]) for level in sorted(rates)]
        prompt, length = item["student_prompt"], len(item["student_ids"])
        assert drawn.student_level[row, prompt:length].tolist() == [number[level] for level in level_of]
        chunk_level = {chunk: number[level] for chunk, level in zip(item["student_chunk"][prompt:], level_of)}
        assert drawn.chunk_level[row, : item["chunks"]].tolist() == [chunk_level[c] for c in range(item["chunks"])]
        assert drawn.student_masked[row].tolist() == masks[0] + [False] * (drawn.student_masked.shape[1] - length)
        assert drawn.teacher_masked[row, : len(item["teacher_ids"])].tolist() == masks[1]
        assert drawn.chunk_masked[row, : item["chunks"]].tolist() == masks[2]
    found = zip(drawn.level_sample.tolist(), drawn.rate.tolist(), drawn.inverse_weight.tolist(), strict=True)
    assert list(found) == expected_levels


@every_form
@every_kind
def test_one_sided_data(form: NoiseSampling, kind: str) -> None:
    items = [samples.make(key, (key, 0), [(3, 0), (key, 0)], student_only=True) for key in range(1, 6)]
    drawn = _draw(items, form, kind)
    assert drawn.teacher_masked is None
    for row, item in enumerate(items):
        shape = {"block": BLOCK if form.per_block else None, "stratified": form.stratified, "exact": form.exact}
        _, _, masks = reference.sampled(item, 0, 0, kind, **shape)
        assert drawn.student_masked[row, : len(masks[0])].tolist() == masks[0]


def _contextual(item: dict[str, Any], masked_DS: np.ndarray) -> np.ndarray:
    """[D, response tokens]: a made-up loss of each masked token, which depends on what else its block has masked."""
    length, loss = len(item["student_ids"]), []
    for i in range(item["student_prompt"], length):
        first = i // BLOCK * BLOCK
        others = sum((1 + j - first) * masked_DS[:, j] for j in range(first, min(first + BLOCK, length)) if j != i)
        loss.append(masked_DS[:, i] * (1 + 0.7 * i + others**1.5))
    return np.stack(loss, 1)


# 2 samples, 4 and 2 blocks; no chunk crosses the end of a block.
ALIGNED = [
    samples.make(1, (2, 1), [(1, 1), (1, 0), (2, 1), (1, 2), (1, 1), (3, 2), (1, 1), (1, 0), (1, 1)]),
    samples.make(2, (0, 0), [(2, 2), (1, 1), (1, 1), (3, 1)]),
]
DRAWS = 4000


def _published_loss(items: list[dict[str, Any]], kind: str) -> float:
    """E over t ~ U(0, 1) and the published masks of sum (1/t) loss, by adding up every set of drawn units.

    A set of k of n units has the weight int t^(k-1) (1-t)^(n-k) dt; here by block, on 20,000 values of t, with plain
    numbers for the tokens' draws.
    """
    t = (np.arange(20_000) + 0.5) / 20_000
    total = 0.0
    for item in items:
        prompt, length, chunk_of = item["student_prompt"], len(item["student_ids"]), item["student_chunk"]
        for first in range(prompt // BLOCK * BLOCK, length, BLOCK):
            tokens = list(range(max(first, prompt), min(first + BLOCK, length)))
            units = [i for i in tokens if kind == "expand" or chunk_of[i] < 0 or chunk_of.index(chunk_of[i]) == i]
            for chosen in product([False, True], repeat=len(units)):
                drawn, k = dict(zip(units, chosen)), sum(chosen)
                masked = np.zeros(length, dtype=bool)
                for i in tokens:
                    mates = [j for j in units if j == i or (chunk_of[i] >= 0 and chunk_of[j] == chunk_of[i])]
                    masked[i] = any(drawn[j] for j in mates)
                weight = (t**k * (1 - t) ** (len(units) - k) / t).mean() if k else 0.0
                total += weight * _contextual(item, masked[None]).sum()
    return total


@every_form
@every_kind
def test_mean_is_the_published_loss(form: NoiseSampling, kind: str) -> None:
    """Over many draws, of a loss that depends on what else is masked; by 4.5 standard errors, and not by far more."""
    means, variances = [], []
    for row, item in enumerate(ALIGNED):
        copies = [{**item, "key": 2 * key + row} for key in range(DRAWS)]
        strata = (permutation(DRAWS, 1, row, b"test"), DRAWS)
        drawn = _draw(copies, form, kind, schedule=Linear(eps=0.0), strata=strata)
        weight_DS = 1 / drawn.inverse_weight[drawn.student_level].numpy()
        response = slice(item["student_prompt"], len(item["student_ids"]))
        loss_D = (weight_DS[:, response] * _contextual(item, drawn.student_masked.numpy())).sum(1)
        means.append(loss_D.mean())
        variances.append(loss_D.var() / DRAWS)
    error, expected = sum(variances) ** 0.5, _published_loss(ALIGNED, kind)
    assert abs(sum(means) - expected) < 4.5 * error
    assert error < 0.05 * expected, "a bias could hide behind this"


@every_form
@every_kind
@pytest.mark.parametrize("schedule", [Linear(eps=0.0), Square(eps=0.0)], ids=["linear", "square"])
def test_every_token_has_its_mean_weight(form: NoiseSampling, kind: str, schedule: Any) -> None:
    """E[masked / inverse_weight] is 1 (synchronous) or 1 + 1/2 + ... + 1/m in a chunk of m tokens (expand: int (1 -
    (1 - t)^m) / t dt), for tokens of chunks that cross the end of a block, too, and for any schedule."""
    count, spans = 4000, [(1, 1), (3, 2), (3, 1), (1, 0), (2, 2), (3, 3)]
    items = [samples.make(key, (2, 1), spans, ended=False) for key in range(count)]
    assert [i // BLOCK for i, c in enumerate(items[0]["student_chunk"]) if c == 2] == [1, 1, 2]
    drawn = _draw(items, form, kind, schedule=schedule, strata=(np.arange(count), count))
    values = drawn.student_masked.double() / drawn.inverse_weight[drawn.student_level]
    of_span = [1.0] * 6 if kind == "synchronous" else [1, 11 / 6, 11 / 6, 1, 3 / 2, 11 / 6]
    expected = torch.tensor([0.0, 0.0] + [want for want, (n, _) in zip(of_span, spans) for _ in range(n)])
    spread = values.std(0) / count**0.5
    assert torch.all((values.mean(0) - expected).abs() <= 4.5 * spread), (values.mean(0), expected)


@every_kind
def test_a_chunk_that_crosses_a_block_has_one_rate(kind: str) -> None:
    form, t = NoiseSampling(per_block=True), np.array([[1e-9, 0.5, 1.0]])
    drawn = _draw([samples.make(0, (1, 1), [(1, 1), (7, 1), (3, 1)], ended=False)], form, kind, t=t)
    assert drawn.student_level[0, 1:].tolist() == [0] * 8 + [1] * 3
    assert drawn.student_masked[0].tolist() == [False] * 9 + [True] * 3
    assert drawn.chunk_level.tolist() == [[0, 0, 1]]
    assert drawn.rate.tolist() == [1e-9, 1.0], "a block in which no chunk starts has no level"


def test_timesteps_are_stratified_over_blocks_and_batch() -> None:
    """8 samples of 4 blocks: each of 32 strata holds exactly one timestep, and each sample has one in each quarter."""
    items = [samples.make(key, (4, 0), [(1, 1)] * 16, ended=False) for key in range(8)]
    strata = (permutation(8, 3, 5, b"strata"), 8)
    form = NoiseSampling(per_block=True, stratified=True)
    rate = _draw(items, form, "synchronous", schedule=Linear(eps=0.0), strata=strata).rate
    assert sorted((rate * 32).long().tolist()) == list(range(32))
    assert [sorted(quarters) for quarters in (rate.view(8, 4) * 4).long().tolist()] == [[0, 1, 2, 3]] * 8
    assert len({tuple(quarters) for quarters in (rate.view(8, 4) * 4).long().tolist()}) > 1
    per_sample = _draw(items, replace(form, per_block=False), "synchronous", schedule=Linear(eps=0.0), strata=strata)
    assert (per_sample.rate * 8).long().tolist() == strata[0].tolist()
    alone = _draw(items[2:3], form, "synchronous", schedule=Linear(eps=0.0), strata=(strata[0][2:3], 8))
    assert alone.rate.tolist() == rate[8:12].tolist()


@every_kind
def test_exact_counts(kind: str) -> None:
    """k of n units, every k as often as every other; no level is empty."""
    items = [samples.make(key, (0, 0), [(1, 1), (2, 1), (1, 0)], ended=False) for key in range(4000)]
    drawn = _draw(items, NoiseSampling(per_block=True, exact=True), kind, seed=6)
    units = 4 if kind == "expand" else 3
    counts = torch.bincount((drawn.rate * units).round().long(), minlength=units + 1)[1:]
    assert torch.all((counts - len(items) / units).abs() < 4.5 * (len(items) / units) ** 0.5)
    assert torch.equal(drawn.rate, drawn.inverse_weight)
    assert bool(drawn.student_masked.any(1).all())
    if kind == "synchronous":
        masked = drawn.student_masked[:, [0, 1, 3]].sum(1)
        assert masked.tolist() == (drawn.rate * 3).round().long().tolist()


@pytest.mark.parametrize(("exact", "by_token"), product([False, True], [False, True]))
@settings(deadline=None, max_examples=40)
@given(items=st.lists(samples.samples(), min_size=1, max_size=4), ratio=st.sampled_from([0.25, 0.5, 0.7]))
def test_compdemo_splits_each_level(exact: bool, by_token: bool, items: list[dict[str, Any]], ratio: float) -> None:
    drawn = _draw(items, NoiseSampling(per_block=True), "expand", padding=3, seed=9)
    first = CompDemo(ratio, exact, by_token).split(samples.collate(items, 3), drawn, 9, 0)
    for row, item in enumerate(items):
        masked = drawn.teacher_masked[row].tolist()[: len(item["teacher_ids"])]
        expected, _ = reference.halves(item, masked, 9, 0, ratio=ratio, exact=exact, by_token=by_token, block=BLOCK)
        assert set(first[row].nonzero()[:, 0].tolist()) == expected


def test_wrong_shape_of_timesteps() -> None:
    with pytest.raises(ValueError, match=r"timesteps of shape \[2\], not \[2, 4\]: pass one per sample, or per block"):
        _draw(ALIGNED, NoiseSampling(per_block=True), "expand", t=np.ones(2))
