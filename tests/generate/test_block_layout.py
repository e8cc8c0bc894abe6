"""Blocks that begin at the answer: the sampler with its cache against the plain one, alone and batched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tide.choices import BLOCK_LAYOUTS
from megatron_tide.models import load_model
from megatron_tide.models.decoding_a2d import BlockDecoder
from megatron_tide.models.sampling_a2d import BLOCKS_AT_ANSWER, DecodingRule
from tests.reference.generate import fill_in
from tests.reference.generate import generate as plain
from tests.support.models import tiny_student_config, write_hub_folder

PAD, MASK, BLOCK = 1, 2, 32
ENDS = (5, 9)
LENGTHS = (1, 20, 31, 32, 33, 63)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = tiny_student_config(vocab_size=24, num_hidden_layers=2)
    return load_model(write_hub_folder(Path(tmp_path_factory.mktemp("student")), config, seed=3))


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 24, (length,), generator=generator).tolist() for length in lengths]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    keep = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": keep}


def test_the_flags_offer_what_the_decoder_knows() -> None:
    assert dict(BLOCK_LAYOUTS) == BLOCKS_AT_ANSWER


@pytest.mark.parametrize(("new", "ends"), [(64, ()), (40, ()), (64, ENDS), (3, ())])
def test_same_tokens_as_the_plain_way(model: Any, new: int, ends: tuple[int, ...]) -> None:
    prompts = prompts_of(LENGTHS)
    rule: dict[str, Any] = {"max_new_tokens": new, "tokens_per_step": 8 if new > 8 else 1, "threshold": None}
    options = {**rule, "block_size": BLOCK, "eos_token_ids": ends, "block_layout": "answer"}
    together = model.generate(**padded(prompts), **options)[:, max(LENGTHS) :]
    whole = DecodingRule(
        **(rule | {"block_size": BLOCK, "eos_token_ids": ends, "block_layout": "answer"}),
        mask_token_id=MASK,
        pad_token_id=PAD,
    )
    static = BlockDecoder(model, [torch.tensor(prompt) for prompt in prompts], whole, [0] * 6, static=True)
    assert list(static.run())
    differ = 0
    for prompt, row, other in zip(prompts, together.tolist(), static.completions()):
        expected = plain(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=ends, from_answer=True, **rule)
        alone = model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert row[: len(expected)] == alone == other.tolist() == expected
        differ += expected != plain(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=ends, **rule)
    assert differ > 2  # of the six lengths, one is the same in both layouts


def test_masks_of_a_prompt_are_filled_in(model: Any) -> None:
    """A hole in the short first block, across a block's end, at the end of the prompt; then with an answer behind."""
    prompts = prompts_of((20, 40, 33, 63))
    for prompt, places in zip(prompts, [(3,), (7, 8, 9), (0, 32), (62,)]):
        for place in places:
            prompt[place] = MASK
    how: dict[str, Any] = {"block_size": BLOCK, "eos_token_ids": (), "block_layout": "answer", "tokens_per_step": 2}
    filled = model.generate(**padded(prompts), **how, max_new_tokens=0)
    rule: dict[str, Any] = {"max_new_tokens": 36, "tokens_per_step": 2, "threshold": None}
    together = model.generate(**padded(prompts), **(how | {"max_new_tokens": 36}))
    for row, prompt in enumerate(prompts):
        lead = -len(prompt) % BLOCK
        expected = fill_in(model, prompt, block=BLOCK, mask_id=MASK, eos_ids=(), tokens_per_step=2, lead=lead)
        assert filled[row, 63 - len(prompt) :].tolist() == expected
        assert model.generate(torch.tensor([prompt]), **how, max_new_tokens=0)[0].tolist() == expected
        answer = plain(model, expected, block=BLOCK, mask_id=MASK, eos_ids=(), from_answer=True, **rule)
        assert together[row, 63 - len(prompt) :].tolist() == expected + answer


def test_prompts_of_one_length_need_no_mask(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots before the first text are not computed, and whole blocks attend without a mask, as in the other layout."""
    rule = DecodingRule(
        block_size=8,
        mask_token_id=MASK,
        eos_token_ids=(),
        pad_token_id=PAD,
        max_new_tokens=20,
        tokens_per_step=4,
        block_layout="answer",
    )
    told: list[tuple[int, bool]] = []
    original = type(model).backbone

    def backbone(self: Any, ids: torch.Tensor, attention_mask: Any, **rest: Any) -> torch.Tensor:
        told.append((ids.shape[1], attention_mask is not None))
        return original(self, ids, attention_mask, **rest)

    monkeypatch.setattr(type(model), "backbone", backbone)
    decoder = BlockDecoder(model, [torch.arange(3, 14), torch.arange(4, 15)], rule, [0, 0])
    assert list(decoder.run()) == [False, True, False, True, True]
    assert told == [(19, True), (8, False), (16, True), (8, False), (16, True)]


def test_another_layout_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="block_layout is 'left'; use sequence or answer"):
        model.generate(torch.tensor([[5, 6]]), block_layout="left")
