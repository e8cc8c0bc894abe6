"""Attention: the staircase against its definition, padding, and flex_attention against dense attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_tide.diffusion import BlockDiffusionMask, staircase_mask
from tests.reference import views as reference


@settings(deadline=None)
@given(length=st.integers(0, 20), block=st.integers(1, 7))
def test_staircase_mask_equals_its_definition(length: int, block: int) -> None:
    mask = staircase_mask(length, block)
    assert mask.dtype == torch.bool
    assert mask.shape == (2 * length, 2 * length)
    assert mask.tolist() == reference.staircase(length, block)


@pytest.mark.parametrize(("length", "block"), [(-1, 4), (8, 0)])
def test_staircase_mask_of_nothing_sensible(length: int, block: int) -> None:
    with pytest.raises(ValueError, match="staircase"):
        staircase_mask(length, block)


@settings(deadline=None)
@given(length=st.integers(1, 12), data=st.data())
def test_dense_equals_the_rule(length: int, data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    noised, valid = data.draw(flags), data.draw(flags)
    block = data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    attention = BlockDiffusionMask(torch.tensor([block]).int(), torch.tensor([noised]), torch.tensor([valid]))
    expected = []
    for q in range(length):
        row = []
        for k in range(length):
            if not valid[q]:
                row.append(q == k)
            elif noised[q]:
                row.append(valid[k] and (block[q] == block[k] if noised[k] else block[k] < block[q]))
            else:
                row.append(valid[k] and not noised[k] and block[k] <= block[q])
        expected.append(row)
    assert attention.dense()[0, 0].tolist() == expected


def _pattern(samples: int, length: int) -> BlockDiffusionMask:
    generator = torch.Generator().manual_seed(0)
    place = torch.arange(length)
    noised = place < torch.randint(0, length, (samples, 1), generator=generator)
    valid = place < torch.randint(length // 2, length + 1, (samples, 1), generator=generator)
    return BlockDiffusionMask(torch.randint(0, 4, (samples, length), generator=generator).int(), noised, valid)


def test_padding_sees_itself_and_is_seen_by_nobody_else() -> None:
    attention = _pattern(5, 24)
    assert not attention.valid.all()
    dense = attention.dense()[:, 0]
    eye = torch.eye(24, dtype=torch.bool)
    for mask, valid in zip(dense, attention.valid, strict=True):
        assert torch.equal(mask[~valid], eye[~valid])
        assert torch.equal(mask[:, ~valid], eye[:, ~valid])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_equals_dense() -> None:
    attention = _pattern(3, 160)  # more than one of flex's own blocks, and not a multiple of them
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(3, 2, 160, 8, generator=generator) for _ in range(3))
    dense = scaled_dot_product_attention(q, k, v, attn_mask=attention.dense())
    assert torch.allclose(flex_attention(q, k, v, block_mask=attention.flex()), dense, atol=1e-5)
    # On a GPU flex skips the blocks it holds empty: none of them may hold an attended pair.
    blocks = torch.nn.functional.max_pool2d(attention.dense().float(), 128, ceil_mode=True).bool()
    assert torch.equal(attention.flex().to_dense().bool(), blocks)
    assert not blocks.all()
    everything = scaled_dot_product_attention(q, k, v)
    assert not torch.allclose(everything, dense, atol=1e-2)
