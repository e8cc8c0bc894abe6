"""A mask token is added to the files of a tokenizer of any kind, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.bridge.mask_token import choose_mask, save_with_mask
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece


@pytest.mark.parametrize("train", [train_byte_bpe, train_sentencepiece])
def test_a_new_token_is_the_mask_of_the_saved_files(tmp_path: Path, train: Any) -> None:
    train(tmp_path / "in", TEXTS, 340)
    before = load_tokenizer(tmp_path / "in")
    assert choose_mask(before, None) == ("<|mask|>", before.mask_id)
    token, index = choose_mask(before, "<hidden>")
    assert index == before.vocab_size
    after = save_with_mask(before, tmp_path / "out", token, index)
    assert (after.mask_id, after.id_to_token(index), after.vocab_size) == (index, "<hidden>", index + 1)
    assert after.template_fingerprint == before.template_fingerprint
    for text in TEXTS[:6]:
        assert after.encode(text).tolist() == before.encode(text).tolist()
    assert after.encode_prompt("a<hidden>")[-1] == index
    assert index not in after.encode("a<hidden>").tolist()
    assert load_tokenizer(tmp_path / "in").fingerprint == before.fingerprint
