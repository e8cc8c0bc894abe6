"""Which layers a stage gets; what ranks of a pipeline send one another arrives unchanged."""

from __future__ import annotations

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.diffusion import BlockDiffusionMask, ModelInput
from megatron_tide.hosting.layerwise import ForwardState, TeacherInputs
from megatron_tide.hosting.pipeline import Sizes, balanced, pack, pack_outputs, unpack, unpack_outputs


def flat_layers(sizes):
    return [SimpleNamespace(flat_bytes=size) for size in sizes]


def heaviest(sizes, bounds):
    return max(sum(sizes[start:end]) for start, end in pairwise(bounds))


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.data())
def test_no_other_cut_has_a_lighter_heaviest_stage(sizes, data):
    stages = data.draw(st.integers(1, len(sizes)))
    bounds = balanced(flat_layers(sizes), stages)
    assert len(bounds) == stages + 1
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    assert all(start < end for start, end in pairwise(bounds)), "no stage is empty"
    cuts = combinations(range(1, len(sizes)), stages - 1)
    assert heaviest(sizes, bounds) == min(heaviest(sizes, [0, *cut, len(sizes)]) for cut in cuts)


def test_where_deepspeeds_own_cut_is_not_the_best():
    sizes = [5, 1, 27, 16, 6, 8, 26, 1, 23]
    assert balanced(flat_layers(sizes), 3) != [0, 3, 6, 9]
    assert heaviest(sizes, balanced(flat_layers(sizes), 3)) == 49


def test_lighter_stages_are_even_too():
    """Twenty equal layers on eight stages need three on some; none is left with the embedding alone."""
    bounds = balanced(flat_layers([6, *[16] * 20, 6]), 8)
    assert {end - start for start, end in pairwise(bounds)} <= {2, 3, 4}


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match=r"a pipeline of 4 stages, but this teacher has 3 parts .* at most 3 stages"):
        balanced(flat_layers([1, 2, 3]), 4)


CPU = torch.device("cpu")


@st.composite
def questions(draw):
    """Any sizes, from nothing scored to every position; values of full range."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sequences, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    rows = draw(st.integers(0, sequences * length))
    pairs = draw(st.integers(0, rows))

    def whole(shape, top):
        return torch.randint(0, top, shape, generator=generator)

    shape = sequences, length
    attention = BlockDiffusionMask(whole(shape, 2**31 - 1).int(), whole(shape, 2).bool(), whole(shape, 2).bool())
    order = torch.randperm(sequences * length, generator=generator)
    asked = ModelInput(whole(shape, 2**40), whole(shape, 2**40), attention, order[:rows])
    return TeacherInputs(asked, whole((rows,), 2**40), torch.randperm(rows, generator=generator)[:pairs])


def tensors_of(inputs):
    asked, attention = inputs.input, inputs.input.attention
    parts = asked.input_ids, asked.position_ids, asked.rows, attention.block, attention.noised, attention.valid
    return *parts, inputs.targets, inputs.pair_index


@given(st.lists(questions(), min_size=1, max_size=4))
def test_questions(asked):
    """Several in one buffer, cut again by their sizes alone."""
    sizes = [Sizes.of(inputs) for inputs in asked]
    buffer = torch.cat([pack(inputs) for inputs in asked])
    assert buffer.dtype == torch.int64
    for inputs, packed, size in zip(asked, buffer.split([size.packed for size in sizes]), sizes, strict=True):
        for sent, come in zip(tensors_of(inputs), tensors_of(unpack(packed, size)), strict=True):
            assert (sent.dtype, sent.shape) == (come.dtype, come.shape)
            assert torch.equal(sent, come)


@given(
    st.lists(questions(), max_size=4),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.booleans(),
    st.integers(0, 7),
)
def test_answers(asked, hidden, dtype, with_hidden, padding):
    """Bit for bit, NaN and infinity too; the buffer may be longer than what is in it."""
    sent = [answered(ForwardState(inputs), hidden, dtype) for inputs in asked]
    buffer = pack_outputs(sent, with_hidden, CPU)
    width = hidden if with_hidden else 0
    assert len(buffer) == sum(Sizes.of(inputs).output_bytes(width, dtype) for inputs in asked)
    come = [ForwardState(inputs) for inputs in asked]
    unpack_outputs(torch.nn.functional.pad(buffer, (0, padding)), come, width, dtype)
    for mine, theirs in zip(come, sent, strict=True):
        assert same_bits(mine.target_logprobs, theirs.target_logprobs)
        if with_hidden:
            assert same_bits(mine.pair_hidden, theirs.pair_hidden)


def answered(state, hidden, dtype):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40])
    state.target_logprobs = torch.cat([special, torch.randn(len(state.inputs.targets))])[: len(state.inputs.targets)]
    state.pair_hidden = torch.randn(len(state.inputs.pair_index), hidden).to(dtype)
    return state


def same_bits(mine, theirs):
    whole = {2: torch.int16, 4: torch.int32}[theirs.element_size()]
    same = (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    return same and torch.equal(mine.contiguous().view(whole), theirs.view(whole))
