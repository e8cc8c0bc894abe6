"""Noise: against the loop-written definition, its rates, and its independence of everything but the sample's key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.diffusion import MASKINGS, Noise, noise
from megatron_tide.diffusion.counter_rng import uniforms
from megatron_tide.diffusion.noise_schedule import Linear
from tests.diffusion import samples
from tests.reference import noise as reference

KINDS = sorted(MASKINGS)


def _masks(result: Noise, row: int, sample: dict[str, Any]) -> tuple[list[bool], list[bool] | None, list[bool]]:
    teacher = result.teacher_masked
    return (
        result.student_masked[row, : len(sample["student_ids"])].tolist(),
        None if teacher is None else teacher[row, : len(sample["teacher_ids"])].tolist(),
        result.chunk_masked[row, : sample["chunks"]].tolist(),
    )


def test_draws_are_the_published_philox() -> None:
    assert uniforms(3, 1, -5, b"noise", 11).tolist() == reference.draws(3, 1, -5, "noise", 11)


def test_draws_never_change() -> None:
    """Golden values: a change here is a change of every trained run."""
    golden = [0.4954140096179006, 0.0709549177630836, 0.21582468881953998]
    assert uniforms(1234, 2, 9876543210, b"noise", 3).tolist() == golden


@pytest.mark.parametrize(
    "changed", [(1, 0, 7, b"noise"), (0, 1, 7, b"noise"), (0, 0, 8, b"noise"), (0, 0, 7, b"other")]
)
def test_every_part_of_the_key_counts(changed: tuple[int, int, int, bytes]) -> None:
    assert not set(uniforms(*changed, 100)) & set(uniforms(0, 0, 7, b"noise", 100))


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(items=st.lists(samples.samples(), min_size=1, max_size=4), seed=st.integers(0, 2**40), padding=st.integers(0, 5))
def test_noise_equals_reference(kind: str, items: list[dict[str, Any]], seed: int, padding: int) -> None:
    result = noise(samples.collate(items, padding), seed=seed, epoch=2, masking=MASKINGS[kind])
    for row, item in enumerate(items):
        t, *masks = reference.masks(item, seed, 2, kind, 1e-3)
        assert result.rate[row].item() == t
        assert _masks(result, row, item) == tuple(masks)
        assert not result.student_masked[row, len(item["student_ids"]) :].any()
        assert not result.teacher_masked[row, len(item["teacher_ids"]) :].any()
        assert not result.chunk_masked[row, item["chunks"] :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_a_sample_does_not_have_are_not_masked(kind: str) -> None:
    """Beside a sample of more chunks, and at the full width of the batch: every draw could be taken by mistake."""
    batch = samples.collate([samples.make(0, (0, 0), [(1, 1)] * 4, ended=False), samples.make(1, (3, 3), [(4, 4)])])
    result = noise(batch, seed=0, epoch=0, masking=MASKINGS[kind], t=np.ones(2))
    assert result.chunk_masked.tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(items=st.lists(samples.samples(student_only=True), min_size=1, max_size=3))
def test_one_sided_data(kind: str, items: list[dict[str, Any]]) -> None:
    result = noise(samples.collate(items), seed=0, epoch=0, masking=MASKINGS[kind])
    assert result.teacher_masked is None
    assert result.chunk_masked.shape == (len(items), 0)
    for row, item in enumerate(items):
        _, student, _, _ = reference.masks(item, 0, 0, kind, 1e-3)
        assert result.student_masked[row, : len(student)].tolist() == student


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(items=st.lists(samples.samples(), min_size=2, max_size=5), order=st.randoms(use_true_random=False))
def test_noise_belongs_to_the_sample(kind: str, items: list[dict[str, Any]], order: Any) -> None:
    """Alone, or shuffled among others in a wider batch: the same noise."""
    shuffled = list(range(len(items)))
    order.shuffle(shuffled)
    together = noise(samples.collate([items[i] for i in shuffled], 6), seed=5, epoch=1, masking=MASKINGS[kind])
    for row, i in enumerate(shuffled):
        alone = noise(samples.collate([items[i]]), seed=5, epoch=1, masking=MASKINGS[kind])
        assert together.rate[row] == alone.rate[0]
        assert _masks(together, row, items[i]) == _masks(alone, 0, items[i])


def _many(count: int) -> Any:
    """Prompt, a 1:1 chunk, a 2:1 chunk, an unaligned student token, a 3:2 chunk, and the end."""
    spans = [(1, 1), (2, 1), (1, 0), (3, 2)]
    return samples.collate([samples.make(key, (3, 2), spans) for key in range(count)])


# Bounds are 4.5 standard deviations: with a right generator a fresh seed would fail about once in 10,000 tries.
COUNT, RATE = 4000, 0.3
BOUND = 4.5 * (RATE * (1 - RATE) / COUNT) ** 0.5


def test_synchronous_rate_of_every_token_is_t() -> None:
    batch = _many(COUNT)
    t = np.full(COUNT, RATE)
    result = noise(batch, seed=11, epoch=0, masking=MASKINGS["synchronous"], t=t)
    rates = result.student_masked.double().mean(0)[3:]
    assert torch.all((rates - RATE).abs() < BOUND), rates
    both = (result.chunk_masked[:, 1] & result.chunk_masked[:, 2]).double().mean()
    assert abs(both - RATE**2) < BOUND  # units are independent of each other


def test_expand_rate_grows_with_the_chunk() -> None:
    result = noise(_many(COUNT), seed=11, epoch=0, masking=MASKINGS["expand"], t=np.full(COUNT, RATE))
    rates = result.student_masked.double().mean(0)[3:10]
    expected = 1 - (1 - RATE) ** torch.tensor([1, 2, 2, 1, 3, 3, 3])
    assert torch.all((rates - expected).abs() < 4.5 * (expected * (1 - expected) / COUNT).sqrt()), rates
    assert rates[4] > RATE + BOUND  # the very thing synchronous mends: its test can fail


def test_timesteps_are_uniform_from_eps_on() -> None:
    eps = 0.2
    t = noise(_many(COUNT), seed=3, epoch=0, masking=MASKINGS["expand"], schedule=Linear(eps=eps)).rate.sort().values
    assert eps < t[0]
    assert t[-1] < 1
    empirical = torch.arange(1, COUNT + 1) / COUNT
    assert ((t - eps) / (1 - eps) - empirical).abs().max() < 1.95 / COUNT**0.5  # Kolmogorov-Smirnov, p = 0.001


def test_seeds_and_epochs_differ() -> None:
    batch = _many(50)
    runs = [noise(batch, seed=s, epoch=e, masking=MASKINGS["expand"]) for s, e in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(run.rate.tolist()) for run in runs}) == 3
    assert not torch.equal(runs[0].student_masked, runs[2].student_masked)


@pytest.mark.parametrize("kind", KINDS)
def test_given_timesteps_keep_the_draws(kind: str) -> None:
    """A higher rate only adds masks to a lower one's, and rate 1 masks every response token."""
    batch = _many(20)
    low, high, all_ = (
        noise(batch, seed=0, epoch=0, masking=MASKINGS[kind], t=torch.full((20,), t)) for t in (0.2, 0.6, 1.0)
    )
    assert low.rate.dtype == torch.float64
    assert torch.all(low.student_masked <= high.student_masked)
    assert low.student_masked.sum() < high.student_masked.sum()
    assert all_.student_masked.sum(1).tolist() == (batch.student.length - batch.student.prompt).tolist()
    assert all_.teacher_masked.sum(1).tolist() == (batch.teacher.length - batch.teacher.prompt).tolist()


@pytest.mark.parametrize("t", [[0.5], [0.5, 0.0], [0.5, 1.5], [0.5, float("nan")]])
def test_bad_timesteps(t: list[float]) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        noise(_many(2), seed=0, epoch=0, masking=MASKINGS["expand"], t=np.array(t))


def test_bad_eps() -> None:
    with pytest.raises(ValueError, match="eps"):
        Linear(eps=1.0)
