"""A decoding pass of fixed shapes never waits for the device, and mixes no devices; how often a block waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_tide.models import fresh_model
from megatron_tide.models.decoding_a2d import BlockDecoder, DecodingRule
from tests.support.models import tiny_student_config
from tests.support.no_device import Waits, model_without_values, without_a_build, without_values

RULE = {"block_size": 4, "mask_token_id": 2, "eos_token_ids": (5,), "pad_token_id": 1, "max_new_tokens": 16}
RULES = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "threshold": {"threshold": 0.9, "tokens_per_step": 2},
    "ends last": {"eos_in_order": True, "min_new_tokens": 3},
}


def decoder_of(more: dict[str, Any]) -> BlockDecoder:
    model = fresh_model(tiny_student_config(), 0).eval()
    prompts = [torch.arange(10, 10 + length) for length in (9, 4, 6)]
    return BlockDecoder(model, prompts, DecodingRule(**RULE, **more), range(3), static=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("rule", RULES)
def test_a_pass_never_waits(rule: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, mode = decoder_of(RULES[rule]), FakeTensorMode()
    without_a_build(monkeypatch)
    decoder.model = model_without_values(decoder.model, mode, device, False)
    decoder.device = torch.device(device)
    for name, value in vars(decoder).items():
        if isinstance(value, torch.Tensor) and not name.endswith(("shift_B", "prompt_B", "blocks_B")):
            setattr(decoder, name, without_values(value, mode, device))
    with mode, torch.inference_mode():
        for slots in (torch.arange(12, device=device), torch.arange(8, 16, device=device)):
            decoder._work(slots)
    assert decoder.tokens_BL.device.type == device


@pytest.mark.parametrize(("rule", "asks"), [("greedy", 0), ("sampled", 0), ("threshold", 1), ("ends last", 0)])
def test_waits_of_a_whole_answer(rule: str, asks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two for each block, how many passes it takes and who has ended; with a threshold one more for each pass."""
    decoder, lists = decoder_of(RULES[rule]), []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(1) or plain(tensor))
    with Waits() as waits:
        ends = list(decoder.run())
    assert len(ends) == decoder.passes > sum(ends) >= 4
    on_host = 1  # the number of blocks
    assert len(waits.names) - on_host == sum(ends) + asks * decoder.passes
    assert len(lists) == sum(ends)
