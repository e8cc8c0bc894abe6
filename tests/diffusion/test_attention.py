"""Attention: the staircase against its definition, padding, and flex_attention against dense attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_tide.data.batch import Tokens
from megatron_tide.diffusion import ATTENTION_LAYOUTS, BlockDiffusionMask, ModelInput, StudentLayout, staircase_mask
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


STUDENTS = {
    "blocks": StudentLayout(),
    "joint": StudentLayout(next_token=True),
    "causal": StudentLayout(denoise=False, next_token=True),
}


def _layout(context: str, lengths: list[int], prompts: list[int], block: int) -> ModelInput:
    """A layout's input for samples of these lengths, in which every third token is masked."""
    length, prompt = torch.tensor(lengths), torch.tensor(prompts)
    ids = torch.arange(max(lengths)).expand(len(lengths), -1).contiguous()
    masked = (ids % 3 == 0) & (ids >= prompt[:, None]) & (ids < length[:, None])
    tokens = Tokens(ids, torch.zeros_like(ids).int(), length, prompt, length - 1)
    scored = masked.nonzero(as_tuple=True)
    if context in STUDENTS:
        layout, nothing = STUDENTS[context], (scored[0][:0], scored[0][:0])
        return layout.input(tokens, layout.masked(masked), scored, nothing, block=block, mask_id=0)
    return ATTENTION_LAYOUTS[context](tokens, masked, *scored, block=block, mask_id=0)


@pytest.mark.parametrize("context", [*STUDENTS, *ATTENTION_LAYOUTS])
@pytest.mark.parametrize("block", [4, 32, 128, 256])
def test_tiles_from_codes_are_those_of_the_whole_mask(context: str, block: int) -> None:
    """For every layout, lengths below, at and above full tiles, prompts of none, part and most of a sample."""
    cases = [([256, 512, 130], [0, 200, 129]), ([640, 640], [0, 513]), ([96, 31], [5, 0]), ([513, 260, 512], [1, 2, 3])]
    for lengths, prompts in cases:
        mask = _layout(context, lengths, prompts, block).attention
        made, samples, length = mask.flex(), *mask.block.shape
        wanted = create_block_mask(made.mask_mod, samples, None, length, length, device="cpu")
        assert made.shape == wanted.shape
        assert made.BLOCK_SIZE == wanted.BLOCK_SIZE
        for of in ("kv", "full_kv", "q", "full_q"):
            counts, theirs = getattr(made, f"{of}_num_blocks"), getattr(wanted, f"{of}_num_blocks")
            assert torch.equal(counts, theirs)
            listed, order = getattr(made, f"{of}_indices"), getattr(wanted, f"{of}_indices")
            assert listed.dtype == order.dtype == counts.dtype == torch.int32
            used = torch.arange(listed.shape[-1]) < counts[..., None]
            assert torch.equal(listed[used], order[used])
        ahead = mask.with_tiles()
        assert ahead.tiles is not None
        assert torch.equal(ahead.flex().kv_indices, made.kv_indices)
        assert torch.equal(ahead.dense(), mask.dense())
