"""Byte-prefix rows: the first row of every chunk, against loops over tokens; one-to-one chunks as without them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_tide.config import StrategyConfig
from megatron_tide.diffusion import ATTENTION_LAYOUTS, MASKINGS, TeacherLayout, build_inputs, noise
from megatron_tide.objectives import VocabMap, build_strategy
from megatron_tide.objectives.distribution import PrefixMap
from tests.diffusion import samples
from tests.objectives.handmade import MAPPED, SAMPLES, STUDENT_VOCAB, TEACHER_VOCAB, answer, heads, micro_batch
from tests.objectives.test_distribution import KINDS, categories, random_rows, rows
from tests.objectives.test_strategy import PROGRESS, gradients, losses
from tests.reference import chunk as chunk_reference
from tests.reference import distribution as reference

# Teacher ids 15, 3, 2, 8, 10 are the student's 4, 6, 7, 9, 12 (MAPPED); 4, 5, 6 begin with 4, 5, 6; 7 and 9 with none.
PREFIXES = [0, 1, 7, 6, 4, 5, 6, -1, 9, -1, 12, 4, -1, -1, 5, 4]
BRIDGE = SimpleNamespace(**vars(MAPPED), prefix_ids=np.array(PREFIXES))
WHOLE = torch.tensor(MAPPED.teacher_ids)
OPTION = {"strategy": "tide-bridge", "distribution_rows": "byte_prefix", "compdemo": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("width", [TEACHER_VOCAB, TEACHER_VOCAB + 3])
def test_values_and_gradients(kind, temperature, width):
    student, teacher = random_rows(3, STUDENT_VOCAB, width)
    found = rows(kind, PrefixMap(torch.tensor(PREFIXES), WHOLE), student, teacher, temperature)
    sides = [reference.prefix_categories(student[m], teacher[m], temperature, PREFIXES) for m in range(3)]
    expected = torch.stack([reference.DIVERGENCES[kind](*side) for side in sides])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    both = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*both, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_where_no_token_begins_another_it_is_the_map_of_equal_strings(kind):
    student, teacher = random_rows(4, STUDENT_VOCAB, TEACHER_VOCAB)
    only = torch.full((TEACHER_VOCAB,), -1).index_copy(0, WHOLE, torch.tensor(MAPPED.student_ids))
    plain = VocabMap(torch.tensor(MAPPED.student_ids), WHOLE, bucket=True)
    torch.testing.assert_close(
        rows(kind, PrefixMap(only, WHOLE), student, teacher, 2.0), rows(kind, plain, student, teacher, 2.0)
    )


def test_without_a_rest_there_is_no_bucket_and_tiny_mass_is_kept():
    student, teacher = random_rows(2, 3, 4)
    everything = PrefixMap(torch.tensor([0, 1, 2, 1]), torch.tensor([0, 1, 2]))
    assert [side.shape for side in categories(everything, student, teacher, 1.0)] == [(2, 3)] * 2
    low = torch.tensor([[40.0, -60.0, -70.0, -80.0]])
    masses = PrefixMap(torch.tensor([0, 1, 1, -1]), torch.tensor([0])).of_teacher(low, 3, 1.0).log_softmax(-1)
    exact = low.double().log_softmax(-1)
    expected = torch.stack([exact[0, 0], exact[0, 1:3].logsumexp(0), exact[0, 3]])
    torch.testing.assert_close(masses[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_mass_by_spelling():
    _, teacher = random_rows(3, STUDENT_VOCAB, TEACHER_VOCAB)
    whole, several = PrefixMap(torch.tensor(PREFIXES), WHOLE).spelled(teacher)
    for m in range(3):
        p = reference.probabilities(teacher[m], 1.0)
        assert whole[m].item() == pytest.approx(sum(p[v] for v in WHOLE.tolist()).item())
        begins = [v for v, s in enumerate(PREFIXES) if s >= 0 and v not in WHOLE.tolist()]
        assert several[m].item() == pytest.approx(sum(p[v] for v in begins).item())


def batch_of_first_rows(some=SAMPLES):
    """The handmade micro-batch with a pair for every chunk."""
    made = micro_batch(some)
    student, teacher = made.noised.student_chunk.tolist(), made.noised.teacher_chunk.tolist()
    chunks = range(len(made.noised.chunk_level))
    several = [k for k in chunks if (student.count(k), teacher.count(k)) != (1, 1)]
    pairs = {
        "pair_student_index": torch.tensor([student.index(k) for k in chunks]),
        "pair_teacher_index": torch.tensor([teacher.index(k) for k in chunks]),
        "pair_chunk": torch.tensor(list(chunks)),
        "pair_several": torch.tensor(several, dtype=torch.long),
    }
    return made, replace(made, noised=replace(made.noised, **pairs))


@pytest.mark.parametrize("tidal", ["off", "weight"])
@pytest.mark.parametrize("chunk", ["bernoulli_kl", "none"])
def test_the_loss_is_the_loop_over_chunks(chunk, tidal):
    _, batch = batch_of_first_rows()
    weights, counts, noised, T = heads(), batch.local_counts, batch.noised, 2.0
    strategy = build_strategy(StrategyConfig(**OPTION, chunk_objective=chunk, tidal=tidal), BRIDGE)
    _, found, metrics = losses(strategy, batch, weights, counts)
    student, teacher = batch.hidden_MH @ weights.student_VH.T, batch.teacher_RH @ weights.teacher_VH.T
    by_chunk = by_row = torch.zeros((), dtype=torch.float64)
    strength = strategy.strength(PROGRESS, noised.rate)
    for k, level in enumerate(noised.chunk_level.tolist()):
        s = [m for m, c in enumerate(noised.student_chunk.tolist()) if c == k]
        t = [r for r, c in enumerate(noised.teacher_chunk.tolist()) if c == k]
        weight = strength[level] if tidal == "weight" else 1.0
        single = len(s) == len(t) == 1
        if single:
            ours = reference.categories(student[s[0]], T, MAPPED.student_ids, bucket=True)
            theirs = reference.categories(teacher[t[0]], T, MAPPED.teacher_ids, bucket=True)
        else:
            ours, theirs = reference.prefix_categories(student[s[0]], teacher[t[0]], T, PREFIXES)
        divergence = reference.kl([p.detach() for p in theirs], ours)
        by_row = by_row + weight * T**2 * divergence / noised.inverse_weight[level]
        if chunk != "none" and not single:
            lp_s = sum(student[m].log_softmax(-1)[noised.student_targets[m]] for m in s)
            lp_t = sum(teacher[r].log_softmax(-1)[noised.teacher_targets[r]] for r in t)
            target = chunk_reference.teacher_target(lp_t, T)
            by_chunk = by_chunk + weight * chunk_reference.TERMS[chunk](chunk_reference.probability(lp_s, T), *target)
    expected = by_chunk / counts.chunks + by_row / counts.maskable
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        gradients(found, batch, weights), gradients(expected, batch, weights), rtol=1e-7, atol=1e-10
    )
    assert {"spelled/one_token_mass", "spelled/several_tokens_mass"} <= set(metrics)
    pairs, chunks = metrics["chunk/pair_share"]
    assert pairs == len(noised.pair_chunk) - len(noised.pair_several) < chunks


def test_micro_batches_add_up_to_the_batch():
    """Also one without chunks of several tokens: local sums over global counts, as on any number of ranks."""
    strategy, weights = build_strategy(StrategyConfig(**OPTION), BRIDGE), heads()
    (_, batch), *parts = batch_of_first_rows(), *(batch_of_first_rows((sample,)) for sample in SAMPLES)
    counts = batch.local_counts
    whole = losses(strategy, batch, weights, counts)[1]
    shares = [losses(strategy, part, weights, counts)[1] for _, part in parts]
    assert [len(part.noised.pair_several) for _, part in parts] == [2, 0, 2]
    torch.testing.assert_close(sum(shares), whole, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(loss, weights.student_VH)[0] for loss in (whole, sum(shares))]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_one_to_one_chunks_are_compared_as_without_the_option():
    plain, batch = batch_of_first_rows()
    assert 0 < len(batch.noised.pair_several) < len(batch.noised.pair_chunk)
    weights, scores = heads(), {}
    for name, made in (("pairs", plain), ("byte_prefix", batch)):
        strategy = build_strategy(StrategyConfig(**(OPTION | {"distribution_rows": name})), BRIDGE)
        said = answer(made, weights, strategy)
        strength = strategy.strength(PROGRESS, made.noised.rate)
        scores[name] = strategy.score(made.hidden_MH, weights.student_VH, made.noised, said, strength)
    on_pairs = [k for k in batch.noised.pair_chunk.tolist() if k not in batch.noised.pair_several.tolist()]
    assert torch.equal(scores["byte_prefix"].divergence[on_pairs], scores["pairs"].divergence)
    torch.testing.assert_close(scores["byte_prefix"].target_logprobs, scores["pairs"].target_logprobs)


def test_the_first_rows_of_every_chunk_are_found():
    items = [samples.make(key, (3, 2), [(1, 1), (2, 1), (1, 3), (2, 0), (1, 1)]) for key in range(4)]
    batch = samples.collate(items)
    drawn = noise(batch, seed=1, epoch=0, masking=MASKINGS["synchronous"])
    layout = TeacherLayout(ATTENTION_LAYOUTS["full"], samples.TEACHER_BLOCK, samples.TEACHER_MASK, first_rows=True)
    settings = {"student_block": samples.STUDENT_BLOCK, "student_mask_id": samples.STUDENT_MASK}
    found = build_inputs(batch, drawn, teacher=layout, **settings)
    plain = build_inputs(batch, drawn, teacher=replace(layout, first_rows=False), **settings)
    student, teacher = found.student_chunk.tolist(), found.teacher_chunk.tolist()
    chunks = range(len(found.chunk_level))
    assert found.pair_chunk.tolist() == list(chunks)
    assert found.pair_student_index.tolist() == [student.index(k) for k in chunks]
    assert found.pair_teacher_index.tolist() == [teacher.index(k) for k in chunks]
    several = [k for k in chunks if (student.count(k), teacher.count(k)) != (1, 1)]
    assert found.pair_several.tolist() == several != []
    assert plain.pair_several is None
    assert plain.pair_chunk.tolist() == [k for k in chunks if k not in several]


@pytest.mark.parametrize(
    ("flags", "bridge", "line"),
    [
        ({"strategy": "tide-cross"}, BRIDGE, "compares no distributions; use tide-bridge or kl"),
        ({"strategy": "tide-bridge"}, SimpleNamespace(**vars(MAPPED), prefix_ids=None), "again with --fresh"),
        ({"strategy": "tide-bridge", "teacher_top": 4}, BRIDGE, "leave out one of the two"),
    ],
)
def test_what_it_needs_is_said_in_one_line(flags, bridge, line):
    with pytest.raises(ValueError, match=f"--distribution-rows byte_prefix: .*{line}"):
        build_strategy(StrategyConfig(**flags, distribution_rows="byte_prefix"), bridge)
