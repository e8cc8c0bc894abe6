from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tide.objectives import DISTRIBUTION_OBJECTIVES, VocabMap
from megatron_tide.objectives.distribution import FORWARD_KL, PrefixMap, coarsened, most_likely
from tests.reference import distribution as reference

KINDS = list(DISTRIBUTION_OBJECTIVES)
STUDENT_IDS, TEACHER_IDS = [5, 0, 2, 7], [1, 3, 8, 0]


def categories(vocabulary: VocabMap | PrefixMap, student: torch.Tensor, teacher: torch.Tensor, temperature: float):
    """Both sides' logits [m, D] over the compared categories."""
    of_student = vocabulary.of_student(student, teacher.shape[-1], temperature)
    return of_student, vocabulary.of_teacher(teacher, student.shape[-1], temperature)


def rows(kind: str, vocabulary: VocabMap | PrefixMap, student: torch.Tensor, teacher: torch.Tensor, temperature: float):
    student_mD, teacher_mD = categories(vocabulary, student, teacher, temperature)
    log_softmaxed = student_mD.log_softmax(-1), teacher_mD.log_softmax(-1)
    return DISTRIBUTION_OBJECTIVES[kind].rows(*log_softmaxed)


def random_rows(m: int, student_vocab: int, teacher_vocab: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(m, student_vocab, dtype=torch.float64, generator=generator)
    return student.requires_grad_(), 3 * torch.randn(m, teacher_vocab, dtype=torch.float64, generator=generator)


def test_the_tables_name_the_same_objectives():
    assert set(KINDS) == set(reference.DIVERGENCES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("bucket", [True, False])
def test_mapped_ids_values_and_gradients(kind, temperature, bucket):
    student, teacher = random_rows(3, 9, 11)
    vocabulary = VocabMap(torch.tensor(STUDENT_IDS), torch.tensor(TEACHER_IDS), bucket=bucket)
    found = rows(kind, vocabulary, student, teacher, temperature)
    expected = torch.stack(
        [
            reference.DIVERGENCES[kind](
                reference.categories(student[m], temperature, STUDENT_IDS, bucket),
                reference.categories(teacher[m], temperature, TEACHER_IDS, bucket),
            )
            for m in range(3)
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_prefix_is_the_plain_divergence_over_it(kind):
    """Number for number: what torch's own KL says about the two truncated rows, though the heads are wider."""
    student, teacher = random_rows(4, 20, 24)
    found = rows(kind, VocabMap.shared_prefix(17), student, teacher, 2.0)
    logs = {"student": (student[:, :17] / 2).log_softmax(-1), "teacher": (teacher[:, :17] / 2).log_softmax(-1)}
    of, against = ("teacher", "student") if kind == "forward_kl" else ("student", "teacher")
    plain = torch.nn.functional.kl_div(logs[against], logs[of], reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gathered_ids_and_slices_agree(kind):
    student, teacher = random_rows(4, 20, 24)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    gathered = VocabMap(order, order, bucket=False)
    torch.testing.assert_close(
        rows(kind, gathered, student, teacher, 2.0), rows(kind, VocabMap.shared_prefix(17), student, teacher, 2.0)
    )


def test_a_vocabulary_mapped_whole_has_no_bucket():
    student, teacher = random_rows(2, 6, 8)
    vocabulary = VocabMap(torch.tensor([3, 1, 0, 2, 5, 4]), torch.tensor([7, 1, 2, 0, 4, 5]), bucket=True)
    assert [side.shape[1] for side in categories(vocabulary, student, teacher, 1.0)] == [6, 6]
    found = rows("forward_kl", vocabulary, student, teacher, 1.0)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert torch.isfinite(gradient).all()


def test_a_bucket_s_tiny_mass_is_not_lost_to_rounding():
    """fp32: 1 minus the mapped mass would be 0 here, and its log -inf."""
    student = torch.tensor([[30.0, 29.0, -20.0, -21.0]], requires_grad=True)
    teacher = torch.tensor([[29.0, 30.0, -22.0, -20.0, -20.0]])
    vocabulary = VocabMap(torch.tensor([0, 1]), torch.tensor([0, 1]), bucket=True)
    student_mD, _ = categories(vocabulary, student, teacher, 1.0)
    rest = student_mD.log_softmax(-1)[0, 2]
    exact = student.detach().double().log_softmax(-1)[0, 2:].logsumexp(0)
    assert rest.item() == pytest.approx(exact.item(), rel=1e-6)
    found = rows("reverse_kl", vocabulary, student, teacher, 1.0)
    found.sum().backward()
    assert torch.isfinite(student.grad).all()


@given(seed=st.integers(0, 10_000), temperature=st.floats(0.5, 8.0), kind=st.sampled_from(KINDS), bucket=st.booleans())
def test_a_divergence_is_never_negative_and_zero_on_equal_sides(seed, temperature, kind, bucket):
    student, teacher = random_rows(2, 9, 9, seed)
    vocabulary = VocabMap(torch.tensor(STUDENT_IDS), torch.tensor(STUDENT_IDS), bucket=bucket)
    assert (rows(kind, vocabulary, student, teacher, temperature) >= -1e-12).all()
    same = rows(kind, vocabulary, student, student.detach(), temperature)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(same.sum(), student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_a_head_narrower_than_the_bridge_is_one_clear_line():
    student, teacher = random_rows(1, 7, 11)
    vocabulary = VocabMap(torch.tensor(STUDENT_IDS), torch.tensor(TEACHER_IDS), bucket=True)
    with pytest.raises(ValueError, match="the student's head has 7 outputs, but the bridge has its token 7"):
        categories(vocabulary, student, teacher, 1.0)


def test_no_common_string_is_one_clear_line():
    nothing = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="share no token"):
        VocabMap(nothing, nothing, bucket=True)


def test_the_most_likely_categories_and_the_others_as_one():
    """Against loops; the divergence is at most the whole one, and equal to it with all but one category kept."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(6, 9, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    whole = FORWARD_KL.rows(student.log_softmax(-1), teacher.log_softmax(-1))
    for count in (1, 4, 8):
        target, top = most_likely(teacher, count)
        mine = coarsened(student, top)
        for m in range(6):
            p, q = teacher[m].softmax(-1).tolist(), student[m].softmax(-1).tolist()
            kept = sorted(range(9), key=lambda category: -p[category])[:count]
            assert top[m].tolist() == kept
            for one, wanted in ((target[m], p), (mine[m].log_softmax(-1), q)):
                parts = [wanted[k] for k in kept] + [sum(wanted[k] for k in range(9) if k not in kept)]
                torch.testing.assert_close(one.exp(), torch.tensor(parts, dtype=torch.float64))
        coarse = FORWARD_KL.rows(mine.log_softmax(-1), target)
        assert (coarse <= whole + 1e-12).all()
        assert count < 8 or torch.allclose(coarse, whole)
