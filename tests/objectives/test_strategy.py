"""Strategies end to end: the head's pass and the loss, against loops over full logits; values and gradients."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch

from megatron_tide.config import StrategyConfig
from megatron_tide.objectives import Counts, build_strategy, denoise_loss
from megatron_tide.objectives.common import bin_names
from tests.objectives.handmade import (
    LOOSE_ONLY,
    MAPPED,
    NOTHING,
    SAMPLES,
    SHARED,
    Expectation,
    MicroBatch,
    answer,
    heads,
    micro_batch,
    reference_losses,
)

PROGRESS = 0.3
SHARED_MIX = Expectation(rows="forward_kl", rows_tidal="mix")
BRIDGE = Expectation(chunk="bernoulli_kl", rows="forward_kl", chunk_tidal="weight", rows_tidal="mix")
# (switches, bridge, what they must mean)
CASES = {
    "bd3lm": ({"strategy": "bd3lm"}, None, Expectation()),
    "calm": ({"strategy": "calm"}, MAPPED, Expectation(chunk="calm")),
    "tide-cross": ({"strategy": "tide-cross"}, MAPPED, Expectation(chunk="reverse_calm")),
    "tide-cross, one vocabulary": ({"strategy": "tide-cross"}, SHARED, Expectation(chunk="reverse_calm")),
    "bernoulli-kl": ({"strategy": "bernoulli-kl"}, None, Expectation(chunk="bernoulli_kl")),
    "kl": ({"strategy": "kl"}, MAPPED, Expectation(rows="forward_kl")),
    "kl, one vocabulary": ({"strategy": "kl"}, SHARED, Expectation(rows="forward_kl")),
    "reverse-kl": ({"strategy": "reverse-kl"}, MAPPED, Expectation(rows="reverse_kl")),
    "tide-shared": ({"strategy": "tide-shared"}, SHARED, SHARED_MIX),
    "tide-shared, two vocabularies": (
        {"strategy": "tide-shared"},
        MAPPED,
        Expectation(chunk="calm", chunk_tidal="mix"),
    ),
    "tide-bridge": ({"strategy": "tide-bridge"}, MAPPED, BRIDGE),
    "tide-bridge, one vocabulary": ({"strategy": "tide-bridge"}, SHARED, BRIDGE),
    "Reverse CALM with TIDAL as a weight": (
        {"strategy": "tide-cross", "tidal": "weight", "temperature": 5.0},
        MAPPED,
        Expectation(chunk="reverse_calm", chunk_tidal="weight", temperature=5.0),
    ),
    "Reverse CALM, mixed": (
        {"strategy": "tide-cross", "tidal": "mix"},
        MAPPED,
        Expectation(chunk="reverse_calm", chunk_tidal="mix"),
    ),
    "reverse KL, mixed": (
        {"strategy": "reverse-kl", "tidal": "mix", "temperature": 1.0},
        MAPPED,
        Expectation(rows="reverse_kl", rows_tidal="mix", temperature=1.0),
    ),
    "KL as a weight, midrange": (
        {"strategy": "kl", "tidal": "weight", "tidal_midrange": True, "tidal_axes": "training"},
        MAPPED,
        Expectation(rows="forward_kl", rows_tidal="weight", midrange=True, axes="training"),
    ),
    "both objectives by switches": (
        {
            "strategy": "calm",
            "distribution_objective": "reverse_kl",
            "tidal": "weight",
            "tidal_midrange": True,
            "tidal_axes": "timestep",
            "tidal_ramp": "linear",
        },
        MAPPED,
        Expectation("calm", "reverse_kl", "weight", "weight", midrange=True, axes="timestep", ramp="linear"),
    ),
    "tide-bridge without its chunk objective": (
        {"strategy": "tide-bridge", "chunk_objective": "none", "tidal": "off"},
        MAPPED,
        Expectation(rows="forward_kl"),
    ),
    "tide-bridge with Reverse CALM": (
        {"strategy": "tide-bridge", "chunk_objective": "reverse_calm", "tidal_ramp": "linear"},
        MAPPED,
        replace(BRIDGE, chunk="reverse_calm", ramp="linear"),
    ),
    "an objective on the baseline's name": (
        {"strategy": "bd3lm", "chunk_objective": "calm"},
        None,
        Expectation(chunk="calm"),
    ),
}


def built(switches, bridge):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_strategy(StrategyConfig(**switches), bridge)


def losses(strategy, batch: MicroBatch, weights, counts: Counts, slice_rows=None):
    """(denoising loss, distillation loss, metrics) the way a training step asks for them."""
    noised = batch.noised
    strength_N = strategy.strength(PROGRESS, noised.rate)
    said = answer(batch, weights, strategy)
    scores = strategy.score(batch.hidden_MH, weights.student_VH, noised, said, strength_N, slice_rows)
    denoise = denoise_loss(scores.target_logprobs, noised.inverse_weight[noised.student_level], counts.maskable)
    return denoise, *strategy.loss(scores, said, noised, strength_N, counts)


def gradients(loss, batch, weights):
    return torch.autograd.grad(loss, (batch.hidden_MH, weights.student_VH), retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("case", list(CASES))
def test_value_and_gradient_are_the_equations(case):
    switches, bridge, want = CASES[case]
    strategy, batch, weights = built(switches, bridge), micro_batch(SAMPLES), heads()
    counts = Counts(maskable=57, chunks=17, pairs=8)  # global: more than this micro-batch holds
    denoise, distill, _ = losses(strategy, batch, weights, counts)
    expected_denoise, expected_distill = reference_losses(batch, weights, want, bridge, PROGRESS, counts)
    torch.testing.assert_close(denoise, expected_denoise, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(distill, expected_distill, rtol=1e-6, atol=1e-7)  # 1e-7 is the target's floor
    for found, expected in zip(
        gradients(denoise + 0.7 * distill, batch, weights),
        gradients(expected_denoise + 0.7 * expected_distill, batch, weights),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", list(CASES))
def test_two_micro_batches_add_up_to_the_whole(case):
    switches, bridge, _ = CASES[case]
    strategy, weights, whole = built(switches, bridge), heads(), micro_batch(SAMPLES)
    counts = whole.local_counts
    parts = [micro_batch(SAMPLES[:2]), micro_batch(SAMPLES[2:])]
    sums = [sum(part[i] for part in (losses(strategy, batch, weights, counts) for batch in parts)) for i in range(2)]
    denoise, distill, _ = losses(strategy, whole, weights, counts)
    torch.testing.assert_close(torch.stack(sums), torch.stack([denoise, distill]))
    (found,) = torch.autograd.grad(sums[0] + sums[1], weights.student_VH)
    (expected,) = torch.autograd.grad(denoise + distill, weights.student_VH)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("samples", [LOOSE_ONLY, NOTHING], ids=["no chunk", "no row"])
def test_a_rank_with_nothing_to_distil_still_runs_backward(case, samples):
    switches, bridge, _ = CASES[case]
    strategy, batch, weights = built(switches, bridge), micro_batch(samples), heads()
    denoise, distill, metrics = losses(strategy, batch, weights, batch.local_counts)
    (denoise + distill).backward()
    assert distill.item() == 0.0
    assert torch.isfinite(weights.student_VH.grad).all()
    assert batch.hidden_MH.grad.shape == batch.hidden_MH.shape
    _, _, full = losses(strategy, micro_batch(SAMPLES), heads(), Counts(maskable=1, chunks=1, pairs=1))
    assert list(metrics) == list(full)


@pytest.mark.parametrize("case", ["tide-bridge", "kl, one vocabulary", "calm"])
@pytest.mark.parametrize("slice_rows", [1, 2, 100])
def test_how_many_rows_the_head_takes_at_once_changes_nothing(case, slice_rows):
    switches, bridge, _ = CASES[case]
    strategy, batch, weights = built(switches, bridge), micro_batch(SAMPLES), heads()
    counts = batch.local_counts
    default, found = (losses(strategy, batch, weights, counts, rows) for rows in (None, slice_rows))
    torch.testing.assert_close(found[:2], default[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(found[0] + found[1], batch, weights), gradients(default[0] + default[1], batch, weights)
    )


def test_gold_log_probs_keep_their_rows_places():
    batch, weights = micro_batch(SAMPLES), heads()
    plain, split = (built({"strategy": name}, MAPPED) for name in ("calm", "tide-bridge"))
    strength = torch.ones(3, dtype=torch.float64)
    args = [(batch.hidden_MH, weights.student_VH, batch.noised, answer(batch, weights, s)) for s in (plain, split)]
    found = split.score(*args[1], strength)
    torch.testing.assert_close(found.target_logprobs, plain.score(*args[0], strength).target_logprobs)
    assert found.divergence.shape == batch.noised.pair_chunk.shape


def test_each_active_chunk_is_counted_once():
    """tide-bridge = its rows' part over pairs plus its chunk part over the others, both over all active chunks."""
    batch, weights = micro_batch(SAMPLES), heads()
    counts = batch.local_counts
    off = {"strategy": "tide-bridge", "tidal": "off"}
    both = losses(built(off, MAPPED), batch, weights, counts)[1]
    rows_only = losses(built(off | {"chunk_objective": "none"}, MAPPED), batch, weights, counts)[1]
    chunk_only = built(off | {"distribution_objective": "none"}, MAPPED)
    strength = torch.ones(3, dtype=torch.float64)
    said = answer(batch, weights, chunk_only)
    scores = chunk_only.score(batch.hidden_MH, weights.student_VH, batch.noised, said, strength)
    on_pairs = batch.noised.pair_chunk.tolist()
    term = chunk_only.chunk.chunks(
        torch.stack([scores.target_logprobs[batch.noised.student_chunk == k].sum() for k in range(int(counts.chunks))]),
        torch.stack([said.target_logprobs[batch.noised.teacher_chunk == k].sum() for k in range(int(counts.chunks))]),
        torch.ones(int(counts.chunks), dtype=torch.float64),
    )
    others = sum(term[k] for k in range(int(counts.chunks)) if k not in on_pairs)
    torch.testing.assert_close(both, (rows_only * counts.pairs + others) / counts.chunks)


def test_nothing_flows_into_the_teacher():
    batch, weights = micro_batch(SAMPLES), heads()
    strategy = built({"strategy": "tide-bridge"}, MAPPED)
    said = answer(batch, weights, strategy)
    for tensor in (said.target_logprobs, said.hidden, said.head_weight):
        tensor.requires_grad_()
    strength = strategy.strength(PROGRESS, batch.noised.rate)
    scores = strategy.score(batch.hidden_MH, weights.student_VH, batch.noised, said, strength)
    strategy.loss(scores, said, batch.noised, strength, batch.local_counts)[0].backward()
    assert [x.grad for x in (said.target_logprobs, said.hidden, said.head_weight)] == [None, None, None]


def test_bf16_models_give_fp32_losses():
    batch, weights = micro_batch(SAMPLES), heads()
    noised = replace(batch.noised, rate=batch.noised.rate.float(), inverse_weight=batch.noised.inverse_weight.float())
    strategy = built({"strategy": "tide-bridge"}, MAPPED)
    exact = losses(strategy, batch, weights, batch.local_counts)
    hidden, head, teacher_RH, teacher_VH = (
        x.detach().bfloat16() for x in (batch.hidden_MH, weights.student_VH, batch.teacher_RH, weights.teacher_VH)
    )
    narrow = MicroBatch(noised, hidden.requires_grad_(), teacher_RH)
    said = answer(narrow, replace(weights, teacher_VH=teacher_VH), strategy)
    strength = strategy.strength(PROGRESS, noised.rate)
    scores = strategy.score(narrow.hidden_MH, head, noised, said, strength)
    distill, metrics = strategy.loss(scores, said, noised, strength, batch.local_counts)
    assert scores.target_logprobs.dtype == scores.divergence.dtype == distill.dtype == torch.float32
    assert distill.item() == pytest.approx(exact[1].item(), rel=0.05)
    distill.backward()
    assert torch.isfinite(narrow.hidden_MH.grad).all()
    assert all(total.shape == count.shape and total.dim() <= 1 for total, count in metrics.values())


def test_metrics_say_what_happened():
    batch, weights = micro_batch(SAMPLES), heads()
    strategy = built({"strategy": "tide-bridge", "temperature": 5.0}, MAPPED)
    said = answer(batch, weights, strategy)
    _, _, metrics = losses(strategy, batch, weights, batch.local_counts)
    mean = {name: (total / count).item() for name, (total, count) in metrics.items() if not total.dim()}
    for name, (total, count) in metrics.items():
        mean |= dict(zip(bin_names(name), (total / count).tolist())) if total.dim() else {}
    noised, K = batch.noised, len(batch.noised.chunk_level)
    teacher_lp = [said.target_logprobs[noised.teacher_chunk == k].sum().item() for k in range(K)]
    logits = (batch.hidden_MH @ weights.student_VH.T).log_softmax(-1)
    gold = logits.gather(1, noised.student_targets[:, None]).squeeze(1)
    student_lp = [gold[noised.student_chunk == k].sum().item() for k in range(K)]
    assert mean["chunk/teacher_prob"] == pytest.approx(sum(math.exp(x / 5) for x in teacher_lp) / K)
    assert mean["chunk/student_prob"] == pytest.approx(sum(math.exp(x / 5) for x in student_lp) / K)
    below = sum(x < -5 * math.log(2) for x in teacher_lp)
    assert 0 < below < K
    assert mean["chunk/below_break_even"] == pytest.approx(below / K)
    bins: dict[int, list[float]] = {}
    for teacher, student in zip(teacher_lp, student_lp):
        bins.setdefault(int(math.exp(teacher / 5) * 10), []).append(math.exp(student / 5))
    assert 1 < len(bins) < 10
    for number in range(10):
        name, found = f"{number / 10:.1f}", bins.get(number, [])
        assert mean[f"chunk/teacher_probability/{name}"] == pytest.approx(len(found) / K)
        assert metrics["chunk/student_probability"][1][number].item() == len(found)
        if found:
            assert mean[f"chunk/student_probability/{name}"] == pytest.approx(sum(found) / len(found))
    rows = len(noised.student_chunk)
    assert mean["chunk/active_share"] == pytest.approx((rows - 3) / rows)
    assert mean["chunk/pair_share"] == pytest.approx(5 / 9)
    assert mean["tidal/strength"] == pytest.approx(strategy.strength(PROGRESS, noised.rate).mean().item())
    assert metrics["distill/kl"][1].item() == 5
    assert metrics["distill/chunk"][1].item() == 4
    assert not any(tensor.requires_grad for pair in metrics.values() for tensor in pair)
