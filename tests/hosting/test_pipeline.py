"""Which units a stage gets."""

from __future__ import annotations

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.hosting.pipeline import balanced


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


def test_more_stages_than_units():
    with pytest.raises(ValueError, match=r"pipeline\.stages is 4, and this teacher has 3 parts .* at most 3 stages"):
        balanced(flat_layers([1, 2, 3]), 4)
