"""What ranks of a pipeline send one another comes out as it went in."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tide.diffusion import ModelInput, Pattern
from megatron_tide.hosting.parcel import Sizes, pack, pack_answers, unpack, unpack_answers
from megatron_tide.hosting.passage import Passage, Question

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
    pattern = Pattern(whole(shape, 2**31 - 1).int(), whole(shape, 2).bool(), whole(shape, 2).bool())
    order = torch.randperm(sequences * length, generator=generator)
    asked = ModelInput(whole(shape, 2**40), whole(shape, 2**40), pattern, order[:rows])
    return Question(asked, whole((rows,), 2**40), torch.randperm(rows, generator=generator)[:pairs])


def tensors_of(question):
    asked, pattern = question.input, question.input.pattern
    parts = asked.input_ids, asked.position_ids, asked.rows, pattern.block, pattern.noised, pattern.valid
    return *parts, question.gold, question.pair_row


@given(st.lists(questions(), min_size=1, max_size=4))
def test_questions(asked):
    """Several in one parcel, cut again by their sizes alone."""
    sizes = [Sizes.of(question) for question in asked]
    parcel = torch.cat([pack(question) for question in asked])
    assert parcel.dtype == torch.int64
    for question, packed, size in zip(asked, parcel.split([size.packed for size in sizes]), sizes, strict=True):
        for sent, come in zip(tensors_of(question), tensors_of(unpack(packed, size)), strict=True):
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
    """Bit for bit, NaN and infinity too; the parcel may be longer than what is in it."""
    sent = [answered(Passage(question), hidden, dtype) for question in asked]
    parcel = pack_answers(sent, with_hidden, CPU)
    width = hidden if with_hidden else 0
    assert len(parcel) == sum(Sizes.of(question).answer_bytes(width, dtype) for question in asked)
    come = [Passage(question) for question in asked]
    unpack_answers(torch.nn.functional.pad(parcel, (0, padding)), come, width, dtype)
    for mine, theirs in zip(come, sent, strict=True):
        assert same_bits(mine.gold_logp, theirs.gold_logp)
        if with_hidden:
            assert same_bits(mine.pair_hidden, theirs.pair_hidden)


def answered(passage, hidden, dtype):
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40])
    passage.gold_logp = torch.cat([special, torch.randn(len(passage.question.gold))])[: len(passage.question.gold)]
    passage.pair_hidden = torch.randn(len(passage.question.pair_row), hidden).to(dtype)
    return passage


def same_bits(mine, theirs):
    whole = {2: torch.int16, 4: torch.int32}[theirs.element_size()]
    same = (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    return same and torch.equal(mine.contiguous().view(whole), theirs.view(whole))
