"""What benchmarks/generate.py compares: the plain way writes our tokens, and the causal model is transformers' own."""

from __future__ import annotations

import torch

from benchmarks.generate import BLOCK, autoregressive_model, case, our_flops
from megatron_tide.models import fresh_model
from tests.support.models import tiny_student_config


def test_the_ways_that_are_compared() -> None:
    config = {**tiny_student_config(vocab_size=200), "initializer_range": 0.3}
    model = fresh_model(config, 0).eval()
    causal = autoregressive_model(model, config)
    ids = torch.tensor([[3, 4, 5, 6]])
    mask = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(causal(ids).logits, model(ids, mask).logits)
    measured = case(model, causal, batch=2, prompt=BLOCK, new=2 * BLOCK)
    assert measured["identical_tokens"]
    assert measured["ours"]["passes"] == measured["plain"]["passes"] == measured["ar"]["passes"] == 2 * BLOCK
    assert 2.3 < measured["threshold"]["tokens_a_pass"] < 2.7
    assert our_flops(model, 2, BLOCK, BLOCK) < our_flops(model, 2, BLOCK, 2 * BLOCK) / 1.5
    for name in ("plain", "ar_one_token", "ar_threshold"):
        assert measured[f"speedup_{name}"] > 0
