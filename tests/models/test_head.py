"""The chunked head against all logits at once: values, gradients, precision, memory, and no rows at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tide.fast import PieceSizes
from megatron_tide.models import head as head_module
from megatron_tide.models import rows_per_slice, score_rows, target_logprobs
from megatron_tide.models.head import _pieces
from tests.reference import head as reference

ROWS, HIDDEN, VOCAB = 13, 8, 37
CHUNKS = [1, 4, 13, 100, None]


def make(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (rows,), generator=generator)


def entropy_and_target(logits: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers a row: an entropy, and a weighted cross-entropy against a whole distribution per row."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1), -weight * (target.to(logp.dtype) * logp).sum(-1)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_target_logprobs_equal_full_logits_in_fp64(chunk: int | None) -> None:
    hidden, weight, gold = make(torch.float64)
    probe = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    actual, wanted = target_logprobs(hidden, weight, gold, chunk), reference.target_logprobs(hidden, weight, gold)
    torch.testing.assert_close(actual, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (hidden, weight), probe), torch.autograd.grad(wanted, (hidden, weight), probe)
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_score_rows_equals_full_logits_in_fp64(chunk: int | None) -> None:
    hidden, weight, _ = make(torch.float64)
    args = (torch.rand(ROWS, VOCAB, dtype=torch.float64).softmax(-1), torch.rand(ROWS, dtype=torch.float64))
    actual = score_rows(entropy_and_target, hidden, weight, args, chunk)
    wanted = reference.score_rows(entropy_and_target, hidden, weight, args)
    for ours, theirs in zip(actual, wanted):
        torch.testing.assert_close(ours, theirs)
    loss, wanted_loss = (one.square().sum() + 3 * two.sum() for one, two in (actual, wanted))
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(wanted_loss, (hidden, weight))
    ):
        torch.testing.assert_close(ours, theirs)


def test_an_output_that_nobody_uses_or_that_has_no_gradient_is_fine() -> None:
    hidden, weight, gold = make(torch.float64)

    def fn(logits: Tensor, gold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logp = logits.log_softmax(-1)
        return logp.gather(1, gold[:, None])[:, 0], logp.exp().amax(-1), logits.argmax(-1)

    logp, _, best = score_rows(fn, hidden, weight, (gold,), 4)
    assert best.dtype == torch.int64
    assert torch.equal(best, (hidden @ weight.t()).argmax(-1))
    ours = torch.autograd.grad(logp.sum(), (hidden, weight))
    theirs = torch.autograd.grad(reference.target_logprobs(hidden, weight, gold).sum(), (hidden, weight))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("chunk", [4, None])
def test_bf16_rounds_like_a_bf16_model_and_scores_in_fp32(chunk: int | None) -> None:
    hidden, weight, gold = make(torch.bfloat16)
    actual = target_logprobs(hidden, weight, gold, chunk)
    wanted = reference.target_logprobs(hidden.double(), weight.double(), gold)
    assert actual.dtype == torch.float32
    # One rounding of the logits to 8 bits of precision, and those are at most about 10 here.
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=0.06)
    ours = torch.autograd.grad(actual.sum(), (hidden, weight))
    theirs = torch.autograd.grad(wanted.sum(), (hidden, weight))
    for one, other in zip(ours, theirs):
        assert one.dtype == torch.bfloat16
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_give_zero_gradients_that_exist(dtype: torch.dtype) -> None:
    hidden, weight, gold = make(dtype, rows=0)
    logp = target_logprobs(hidden, weight, gold)
    one, two = score_rows(entropy_and_target, hidden, weight, (torch.zeros(0, VOCAB), torch.zeros(0)))
    assert logp.shape == one.shape == two.shape == (0,)
    (logp.sum() + one.sum() + two.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, HIDDEN)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_only_the_needed_gradients_are_made() -> None:
    hidden, weight, gold = make(torch.float64)
    (ours,) = torch.autograd.grad(target_logprobs(hidden, weight.detach(), gold, 4).sum(), hidden)
    (theirs,) = torch.autograd.grad(reference.target_logprobs(hidden, weight, gold).sum(), hidden)
    torch.testing.assert_close(ours, theirs)
    assert not target_logprobs(hidden.detach(), weight.detach(), gold).requires_grad


def test_a_second_backward_through_the_same_graph_gives_the_same_gradients() -> None:
    hidden, weight, gold = make(torch.float64)
    loss = target_logprobs(hidden, weight, gold, 5).square().sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, (hidden, weight))):
        torch.testing.assert_close(one, other)


def test_inputs_are_left_as_they_were() -> None:
    hidden, weight, gold = make(torch.float64)
    before = hidden.detach().clone(), weight.detach().clone(), gold.clone()
    target_logprobs(hidden, weight, gold, 4).sum().backward()
    for one, other in zip((hidden, weight, gold), before):
        assert torch.equal(one, other)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                self.seen = max(self.seen, tensor.numel())
        return output


def test_no_tensor_of_all_rows_by_vocabulary_is_ever_made() -> None:
    rows, vocab, chunk = 64, 512, 8
    hidden = torch.randn(rows, 4, requires_grad=True)
    weight = torch.randn(vocab, 4, requires_grad=True)
    gold = torch.randint(vocab, (rows,))
    with _Largest() as largest:
        logp = target_logprobs(hidden, weight, gold, chunk)
        (entropy, _) = score_rows(lambda logits, g: (logits.logsumexp(-1), g.float()), hidden, weight, (gold,), chunk)
        (logp.sum() + entropy.sum()).backward()
    assert largest.seen == chunk * vocab


def test_rows_per_chunk_keeps_the_budget() -> None:
    assert rows_per_slice(1000, 4 * 1000 * 7 + 3) == 7
    assert rows_per_slice(10**9, 1) == 1


@pytest.mark.parametrize(("total", "most", "multiple"), [(37, 12, 1), (37, 12, 8), (151936, 20000, 128), (300, 5, 128)])
def test_pieces_cover_everything_in_multiples(total: int, most: int, multiple: int) -> None:
    pieces = _pieces(total, most, multiple)
    assert [number for piece in pieces for number in range(piece.start, piece.stop)] == list(range(total))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert all(size % multiple == 0 for size in sizes[:-1])
    assert max(sizes) <= max(most, multiple)
    assert _pieces(0, most, multiple) == [slice(0, 0)]


def test_pieces_of_a_gpu_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, gold = make(torch.float64)
    wanted = reference.target_logprobs(hidden, weight, gold)
    sizes = PieceSizes(logit_bytes=4 * VOCAB * 5, multiple=8, tokens=0)
    monkeypatch.setattr(head_module, "piece_sizes", lambda device: sizes)
    actual = target_logprobs(hidden, weight, gold)
    args = (torch.rand(ROWS, VOCAB, dtype=torch.float64).softmax(-1), torch.rand(ROWS, dtype=torch.float64))
    pairs = [(actual, wanted)]
    pairs += zip(*(how.score_rows(entropy_and_target, hidden, weight, args) for how in (head_module, reference)))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        gradients = (
            torch.autograd.grad(of.square().sum(), (hidden, weight), retain_graph=True) for of in (ours, theirs)
        )
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other)
