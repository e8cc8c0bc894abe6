"""How a pass chooses tokens, and the cache of keys and values: their parts, without a model."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tide.models.decoding_a2d import BlockCache
from megatron_tide.models.sampling_a2d import DecodingRule, choose_tokens, committed, gumbel_noise


def test_temperature_follows_the_softmax() -> None:
    """Frequencies of many draws against softmax(logits / T), the mask token left out."""
    logits = torch.tensor([1.0, 0.0, 5.0, 2.0])
    rule = DecodingRule(block_size=4, mask_token_id=2, eos_token_ids=(), pad_token_id=0, temperature=0.7)
    count = 20000
    for of in (
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
    ):  # every draw its own: by seed, then by place
        noise = gumbel_noise(of, torch.arange(count), torch.tensor(3), 4)
        tokens, confidence = choose_tokens(logits.repeat(count, 1), rule, noise)
        expected = torch.softmax(torch.tensor([1.0, 0.0, float("-inf"), 2.0]) / 0.7, 0)
        found = torch.bincount(tokens, minlength=4) / count
        assert torch.allclose(found, expected, atol=0.015)
        plain_p = torch.softmax(torch.tensor([1.0, 0.0, float("-inf"), 2.0]), 0)
        assert torch.allclose(confidence, plain_p[tokens])


def test_noise_is_gumbels_and_depends_on_every_argument() -> None:
    """Mean and variance of the standard Gumbel distribution, and no correlation between neighbours of any argument."""
    seeds, places, vocab = torch.arange(40), torch.arange(40), 5000
    noise = gumbel_noise(seeds.repeat_interleave(40), places.repeat(40), torch.tensor(1), vocab).double()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.003)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.01)
    later = gumbel_noise(seeds.repeat_interleave(40), places.repeat(40), torch.tensor(2), vocab).double()
    grid = noise.view(40, 40, vocab)
    pairs = [(noise, later), (grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]), (grid[..., 1:], grid[..., :-1])]
    for one, other in pairs:
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(one.numel())
    wide = gumbel_noise(torch.tensor([5, 5 + 2**32]), torch.tensor([3, 3]), torch.tensor(1), vocab)
    assert not torch.equal(wide[0], wide[1])


def test_equal_confidences_are_settled_left_to_right() -> None:
    rule = DecodingRule(block_size=4, mask_token_id=2, eos_token_ids=(), pad_token_id=0, tokens_per_step=2)
    confidence = torch.tensor([[-1.0, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, -1.0], [-1.0, -1.0, 0.9, -1.0]])
    assert committed(confidence, rule).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]


def test_cache_keeps_the_rows_that_stay() -> None:
    cache = BlockCache(4)
    rows = torch.arange(8.0).view(4, 1, 2, 1)
    cache.update(rows, rows + 10, 0)
    cache.commit(2)
    cache.keep([1, 3])
    keys, values = cache.update(rows[:2, :, :1], rows[:2, :, :1], 0)
    assert keys.squeeze().tolist() == [[2, 3, 0], [6, 7, 2]]
    assert values.squeeze().tolist() == [[12, 13, 0], [16, 17, 2]]


def test_cache_forgets_what_was_not_committed() -> None:
    cache = BlockCache(8)
    first = torch.arange(4.0).view(1, 1, 4, 1)
    cache.update(first, first, 0)
    cache.commit(2)
    keys, values = cache.update(first[:, :, :3] + 10, first[:, :, :3] + 20, 0)
    assert keys.flatten().tolist() == [0, 1, 10, 11, 12]
    assert values.flatten().tolist() == [0, 1, 20, 21, 22]
