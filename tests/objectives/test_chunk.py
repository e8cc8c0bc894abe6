from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tide.objectives import CHUNK_OBJECTIVES, chunk_loss
from megatron_tide.objectives.chunk import chunk_logp, log1mexp
from tests.reference import chunk as reference

KINDS = list(CHUNK_OBJECTIVES)
ALWAYS = torch.ones(1, 1, dtype=torch.bool)


def one(student: float, teacher: float, temperature: float, kind: str, dtype: torch.dtype) -> tuple[float, float]:
    """Value and gradient, with regard to the student's log-prob, of the loss of a single chunk."""
    lp = torch.tensor([[student]], dtype=dtype, requires_grad=True)
    loss = chunk_loss(lp, torch.tensor([[teacher]], dtype=dtype), ALWAYS, temperature, kind)
    loss.backward()
    return loss.item(), lp.grad.item()


def test_the_tables_name_the_same_objectives():
    assert set(KINDS) == set(reference.TERMS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_values_and_gradients_are_the_equations(kind, temperature):
    torch.manual_seed(0)
    student = (-8 * torch.rand(3, 5, dtype=torch.float64) - 0.01).requires_grad_()
    teacher = -8 * torch.rand(3, 5, dtype=torch.float64) - 0.01
    teacher[0, 0], teacher[0, 1] = -200.0, 0.0  # both floors
    active = torch.rand(3, 5) < 0.7
    active[0, :2] = True
    loss = chunk_loss(student, teacher, active, temperature, kind)
    expected = reference.chunk_loss(student, teacher, active, temperature, kind)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    gradient, expected_gradient = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_slope(kind):
    for student, teacher in ((-0.3, -2.0), (-4.0, -0.1), (-9.0, -7.0)):
        step = 1e-5
        up, down = (one(student + d, teacher, 2.0, kind, torch.float64)[0] for d in (step, -step))
        assert one(student, teacher, 2.0, kind, torch.float64)[1] == pytest.approx((up - down) / (2 * step), rel=1e-6)


@given(
    student=st.floats(-1e4, 0.0),
    teacher=st.floats(-1e4, 0.0),
    temperature=st.floats(0.5, 10.0),
    kind=st.sampled_from(KINDS),
)
def test_fp32_is_finite_everywhere(student, teacher, temperature, kind):
    value, gradient = one(student, teacher, temperature, kind, torch.float32)
    assert math.isfinite(value)
    assert math.isfinite(gradient)


@given(
    student=st.floats(-60.0, -1e-4),
    teacher=st.floats(-60.0, -1e-4),
    temperature=st.floats(1.0, 5.0),
    kind=st.sampled_from(KINDS),
)
def test_fp32_keeps_fp64_s_numbers(student, teacher, temperature, kind):
    """Where 1 - p has few digits left, too: that is what the log-space form is for."""
    student, teacher = (torch.tensor(x, dtype=torch.float32).item() for x in (student, teacher))
    exact, narrow = (one(student, teacher, temperature, kind, dtype) for dtype in (torch.float64, torch.float32))
    assert narrow[0] == pytest.approx(exact[0], rel=2e-5, abs=2e-5)
    assert narrow[1] == pytest.approx(exact[1], rel=2e-4, abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("student", [0.0, 3e-6, -1e-9, -1e-30])
def test_a_certain_student_has_a_finite_gradient_with_the_right_sign(kind, student):
    """p_s = 1 and a teacher that disagrees: the loss must fall when the student's log-prob does."""
    value, gradient = one(student, -6.0, 2.0, kind, torch.float32)
    assert math.isfinite(value)
    assert 0 < gradient < math.inf
    nearly = one(-1e-5, -6.0, 2.0, kind, torch.float32)
    assert value >= nearly[0]
    assert gradient >= nearly[1] * 0.999


def test_no_chunk_loses_its_gradient_below_the_teacher_s_floor():
    """The student is not floored: CALM still pulls a chunk of p_s = e^-50 up with the full weight p_t."""
    _, gradient = one(-100.0, -1.0, 2.0, "calm", torch.float32)
    assert gradient == pytest.approx(-math.exp(-0.5) / 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_reverse_calm_pushes_down_below_break_even(temperature):
    break_even = -temperature * math.log(2)
    below, above = (one(-1.0, break_even + d, temperature, "reverse_calm", torch.float64)[1] for d in (-0.1, 0.1))
    assert above < 0 < below
    assert one(-1.0, break_even, temperature, "reverse_calm", torch.float64)[1] == pytest.approx(0, abs=1e-12)


def test_reverse_calm_s_pull_is_bounded_by_the_floor():
    for teacher in (0.0, -1e6):
        for student in (-0.01, -1.0, -5.0):
            _, gradient = one(student, teacher, 1.0, "reverse_calm", torch.float64)
            assert abs(gradient) <= math.exp(student) * -math.log(1e-7) + 1e-9


def test_bernoulli_kl_is_reverse_calm_minus_the_student_s_entropy():
    for student, teacher in ((-0.5, -3.0), (-2.0, -0.2)):
        p = torch.exp(torch.tensor(student / 2, dtype=torch.float64))
        parts = one(student, teacher, 2.0, "reverse_calm", torch.float64)[0] - reference.entropy(p).item()
        assert one(student, teacher, 2.0, "bernoulli_kl", torch.float64)[0] == pytest.approx(parts, rel=1e-12)


@given(student=st.floats(-50.0, -1e-3), teacher=st.floats(-30.0, -1e-3))
def test_bernoulli_kl_is_a_divergence(student, teacher):
    assert one(student, teacher, 2.0, "bernoulli_kl", torch.float64)[0] >= -1e-12
    value, gradient = one(teacher, teacher, 2.0, "bernoulli_kl", torch.float64)
    assert value == pytest.approx(0, abs=1e-12)
    assert gradient == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_inactive_chunks_are_never_looked_at(kind):
    student = torch.tensor([[-1.0, math.nan, 5.0]], requires_grad=True)
    teacher = torch.tensor([[-2.0, math.nan, math.inf]])
    loss = chunk_loss(student, teacher, torch.tensor([[True, False, False]]), 2.0, kind)
    loss.backward()
    assert loss.item() == one(-1.0, -2.0, 2.0, kind, torch.float32)[0]
    assert student.grad[0, 1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_no_active_chunk_gives_zero_with_a_graph(kind):
    student = torch.full((2, 3), -1.0, requires_grad=True)
    loss = chunk_loss(student, student.detach(), torch.zeros(2, 3, dtype=torch.bool), 2.0, kind)
    loss.backward()
    assert loss.item() == 0.0
    assert not student.grad.any()


def test_the_teacher_gets_no_gradient_and_bf16_is_widened():
    teacher = torch.full((1, 1), -2.0, requires_grad=True)
    loss = chunk_loss(torch.full((1, 1), -1.0, dtype=torch.bfloat16, requires_grad=True), teacher, ALWAYS, 2.0, "calm")
    loss.backward()
    assert loss.dtype == torch.float32
    assert teacher.grad is None


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown chunk objective 'clam'; use one of calm, reverse_calm, bernoulli_kl"):
        chunk_loss(torch.zeros(1, 1), torch.zeros(1, 1), ALWAYS, 2.0, "clam")


def test_log1mexp_at_both_ends():
    x = torch.tensor([-1e-6, -0.5, -math.log(2), -0.8, -40.0, -800.0], dtype=torch.float64, requires_grad=True)
    y = log1mexp(x)
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()]
    assert y.tolist() == pytest.approx(expected, rel=1e-12)
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx(
        [1 / math.expm1(-v) * -1 if v > -700 else 0.0 for v in x.tolist()], rel=1e-10
    )


def test_log1mexp_s_slope_is_finite_where_exp_rounds_to_one():
    x = torch.tensor([-1e-9, -1e-30, -1e4], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([-1e9, -1e30, 0.0], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_log_prob_that_rounds_above_zero_is_certainty(kind):
    assert one(-1.0, 4e-6, 2.0, kind, torch.float32) == one(-1.0, 0.0, 2.0, kind, torch.float32)
    value, gradient = one(4e-6, -1.0, 2.0, kind, torch.float32)
    assert math.isfinite(value)
    assert math.isfinite(gradient)


def test_chunk_log_probs_are_sums_over_their_tokens():
    logp = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    chunks = chunk_logp(logp, torch.tensor([1, -1, 0, 1, -1]), 3)
    assert chunks.tolist() == [-4.0, -9.0, 0.0]
    chunks.sum().backward()
    assert logp.grad.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert chunk_logp(logp[:0], torch.zeros(0, dtype=torch.long), 0).shape == (0,)
