"""The study's statistics: intervals over seeds and samples that cover, Holm's correction by hand, verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_tide.evaluate import study

BYTES = np.array([10.0, 30.0, 20.0, 40.0])


def simulated(generator: np.random.Generator, seed_sd: float, sample_sd: float, rest_sd: float) -> np.ndarray:
    """Differences in nats [5, 40] of samples of one byte, whose true mean is 0."""
    parts = generator.normal(0.0, seed_sd, (5, 1)), generator.normal(0.0, sample_sd, (1, 40))
    return sum(parts) + generator.normal(0.0, rest_sd, (5, 40))


def test_the_difference_by_hand() -> None:
    nats = np.array([[1.0, 2.0, 3.0, 4.0], [3.0, 2.0, 1.0, 0.0]]) * math.log(2.0)
    found = study.effect(nats, BYTES)
    assert found.by_seed == pytest.approx([0.1, 0.06])
    assert found.difference.value == pytest.approx(0.08)
    assert found.difference.low < 0.08 < found.difference.high
    assert found.difference.high - 0.08 == pytest.approx(0.08 - found.difference.low)


def test_the_resamples_vary_as_means_of_seeds_do() -> None:
    """Where only seeds differ, by 1 and 3 bits in 4 bytes: the variance of a mean of two is half of 0.125."""
    bits = np.repeat([[1.0], [3.0]], 4, axis=1)
    drawn = study._resampled(bits, np.full(4, 4.0), seed=0)
    assert drawn.var(ddof=1) == pytest.approx(0.125 / 2, rel=0.05)
    assert study.effect(bits * math.log(2.0), np.full(4, 4.0)).freedom == pytest.approx(1.0)


@pytest.mark.parametrize("sds", [(1.0, 0.0, 0.5), (0.0, 1.0, 1.0), (0.4, 2.0, 1.0), (0.0, 0.0, 1.0)])
def test_intervals_cover_and_p_is_below_05_as_often(sds: tuple[float, float, float], monkeypatch) -> None:
    monkeypatch.setattr(study, "RESAMPLES", 300)
    generator, rounds = np.random.default_rng(1), 400
    found = [study.effect(simulated(generator, *sds), np.ones(40)) for _ in range(rounds)]
    covered = sum(one.difference.low <= 0.0 <= one.difference.high for one in found) / rounds
    assert covered >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / rounds)
    assert covered == 1.0 - sum(one.p < 0.05 for one in found) / rounds


def test_percentiles_of_few_seeds_would_not_cover() -> None:
    """Why Student's t: with five seeds that matter, percentiles of the usual bootstrap keep far less than 95 %."""
    generator, rounds = np.random.default_rng(2), 400
    means = generator.normal(size=(rounds, 5))
    drawn = means[:, generator.integers(0, 5, (500, 5))].mean(2)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    assert np.mean((low <= 0.0) & (high >= 0.0)) < 0.9


def test_students_t_by_table() -> None:
    for freedom, t in ((1, 12.706), (4, 2.776), (10, 2.228), (100, 1.984)):
        assert study.t_quantile(0.95, freedom) == pytest.approx(t, abs=1e-3)
        assert study.t_outside(t, freedom) == pytest.approx(0.05, abs=1e-4)
        assert study.t_outside(-t, freedom) == study.t_outside(t, freedom)
    assert study.t_outside(0.0, 4) == 1.0


def test_equal_models_differ_by_nothing() -> None:
    found = study.effect(np.zeros((3, 4)), BYTES)
    assert (found.difference.low, found.difference.high, found.p) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("shape", [(1, 4), (4, 1)])
def test_one_seed_or_sample_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="needs two or more of each"):
        study.effect(np.ones(shape), np.ones(shape[1]))


def test_holm_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before."""
    assert study.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert study.holm([0.9, 0.6]) == [1.0, 1.0]
    assert study.holm([]) == []


def test_verdicts() -> None:
    assert study.verdict(-0.1, 0.04) == study.HOLDS
    assert study.verdict(0.1, 0.04) == study.FAILS
    assert study.verdict(-0.1, 0.06) == study.OPEN


def test_a_hypothesis_is_read_from_its_line() -> None:
    found = study.Hypothesis.parse("H7a compdemo < tide-bridge: with CompDemo: against without")
    assert found == study.Hypothesis("H7a", "compdemo", "tide-bridge", "with CompDemo: against without")
    with pytest.raises(ValueError, match="NAME LOWER < HIGHER"):
        study.Hypothesis.parse("H1 a > b: c")
