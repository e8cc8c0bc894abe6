from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tide.choices import TIDAL_AXES, TIDAL_RAMPS
from megatron_tide.objectives import CHUNK_OBJECTIVES, tidal_kl, tidal_strength
from megatron_tide.objectives.chunk import student_bernoulli, teacher_bernoulli
from megatron_tide.objectives.tidal import midrange_weight, mixed_chunks, mixed_rows
from tests.reference import chunk as chunk_reference
from tests.reference import distribution as distribution_reference
from tests.reference import tidal as reference

UNIT = st.floats(0.0, 1.0)


@given(
    progress=UNIT,
    t=UNIT,
    init=UNIT,
    peak=UNIT,
    ramp=st.sampled_from(list(TIDAL_RAMPS)),
    axes=st.sampled_from(list(TIDAL_AXES)),
)
def test_strength_is_the_equation_and_stays_a_share(progress, t, init, peak, ramp, axes):
    found = tidal_strength(progress, torch.tensor([[t]], dtype=torch.float64), init, peak, ramp, axes)
    assert found.shape == (1, 1)
    assert found.item() == pytest.approx(reference.strength(progress, t, init, peak, ramp, axes), abs=1e-12)
    assert -1e-12 <= found.item() <= 1 + 1e-12


def test_the_published_ends():
    t = torch.zeros(1, dtype=torch.float64)
    assert tidal_strength(0.0, t).item() == pytest.approx(0.1)
    assert tidal_strength(0.5, t).item() == pytest.approx(0.5)
    assert tidal_strength(1.0, t).item() == pytest.approx(0.9)
    assert tidal_strength(1.0, torch.ones(1)).item() == 0.0


@pytest.mark.parametrize("ramp", list(TIDAL_RAMPS))
def test_strength_rises_with_training_and_falls_with_t(ramp):
    t = torch.linspace(0, 1, 11)
    curves = torch.stack([tidal_strength(step / 10, t, ramp=ramp) for step in range(11)])
    assert (curves.diff(dim=0)[:, :-1] > 0).all()
    assert (curves.diff(dim=1) < 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ramp": "cosin"}, "unknown TIDAL ramp 'cosin'; use one of cosine, linear"),
        ({"axes": "time"}, "unknown TIDAL axes 'time'; use one of both, training, timestep"),
        ({"progress": 1.5}, r"progress 1.5 is outside \[0, 1\]"),
    ],
)
def test_wrong_words_and_numbers(change, message):
    with pytest.raises(ValueError, match=message):
        tidal_strength(**{"progress": 0.5, "t": torch.ones(1)} | change)


def test_midrange_weight_peaks_in_the_middle():
    t = torch.tensor([0.05, 0.35, 0.5, 0.65, 0.99], dtype=torch.float64)
    assert midrange_weight(t).tolist() == pytest.approx([reference.midrange(x) for x in t.tolist()])
    assert midrange_weight(t)[1].item() == pytest.approx(math.exp(-0.5))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tidal_kl_values_and_gradients(weighted, temperature):
    torch.manual_seed(0)
    student, teacher = (2 * torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    strength = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64) if weighted else None
    plain_weight = weight.tolist() if weighted else [1.0] * 5
    found = tidal_kl(student, teacher, strength, temperature, weight)
    expected = reference.tidal_kl(student, teacher, strength.tolist(), temperature, plain_weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (found, expected)), rtol=1e-9, atol=1e-13)


def test_full_strength_is_plain_kl_and_none_is_nothing():
    student, teacher = torch.randn(4, 9).requires_grad_(), torch.randn(4, 9)
    logs = (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1)
    plain = 4 * torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True)
    torch.testing.assert_close(tidal_kl(student, teacher, torch.ones(4), 2.0), plain)
    nothing = tidal_kl(student, teacher, torch.zeros(4), 2.0)
    nothing.backward()
    assert nothing.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros(4, 9), atol=1e-6, rtol=0)


def test_tidal_kl_without_rows_and_in_bf16():
    student = torch.randn(0, 9, requires_grad=True)
    loss = tidal_kl(student, torch.randn(0, 9), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.shape == (0, 9)
    assert tidal_kl(torch.randn(2, 9).bfloat16(), torch.randn(2, 9).bfloat16(), torch.ones(2)).dtype == torch.float32


@given(seed=st.integers(0, 10_000), share=UNIT)
def test_mixing_logits_or_log_probs_is_the_same(seed, share):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(1, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    strength = torch.tensor([share], dtype=torch.float64)
    from_logits = mixed_rows(student, teacher, strength)
    from_logp = mixed_rows(student.log_softmax(-1), teacher.log_softmax(-1), strength)
    torch.testing.assert_close(from_logits, from_logp, rtol=0, atol=1e-12)
    sides = [distribution_reference.probabilities(row[0], 1.0) for row in (student, teacher)]
    expected = torch.stack(reference.mixed(*sides, share))
    torch.testing.assert_close(from_logits.exp()[0], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", list(CHUNK_OBJECTIVES))
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_chunk_targets_values_and_gradients(kind, share):
    logp = torch.tensor([-0.05, -1.0, -3.0, -9.0, -30.0], dtype=torch.float64, requires_grad=True)
    teacher_logp = torch.tensor([-4.0, -0.01, -2.0, -60.0, -0.5], dtype=torch.float64)
    student, teacher = student_bernoulli(logp, 2.0), teacher_bernoulli(teacher_logp, 2.0)
    target = mixed_chunks(student, teacher, torch.full((5,), share, dtype=torch.float64))
    assert not target.log_p.requires_grad
    found = CHUNK_OBJECTIVES[kind].term(student, target)
    expected = torch.stack(
        [
            chunk_reference.TERMS[kind](
                chunk_reference.probability(s, 2.0), *chunk_reference.mixed_target(s, t, 2.0, share)
            )
            for s, t in zip(logp, teacher_logp)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), logp)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_a_mixed_chunk_target_is_floored_like_the_teacher_s():
    student = student_bernoulli(torch.tensor([-80.0, -1e-9], dtype=torch.float64), 1.0)
    target = mixed_chunks(student, student, torch.zeros(2, dtype=torch.float64))
    assert target.log_p[0].item() == target.log_q[1].item() == pytest.approx(math.log(1e-7))


def test_a_mixed_chunk_target_at_the_extremes_is_finite():
    logp = torch.tensor([0.0, -1e4, -1e-9, -200.0], requires_grad=True)
    teacher = teacher_bernoulli(torch.tensor([-1e4, 0.0, -1.0, -1e4]), 2.0)
    student = student_bernoulli(logp, 2.0)
    for share in (0.0, 0.5, 1.0):
        target = mixed_chunks(student, teacher, torch.full((4,), share))
        for objective in CHUNK_OBJECTIVES.values():
            (gradient,) = torch.autograd.grad(objective.term(student, target).sum(), logp, retain_graph=True)
            assert torch.isfinite(gradient).all()
