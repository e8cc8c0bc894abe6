"""tiktoken-style files: settings beside them, and what is wrong with broken ones."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from megatron_tide.bridge import load_tokenizer
from megatron_tide.bridge.tiktoken import QWEN_PATTERN

TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"abc", b"bc", b" a", " é".encode()]
SETTINGS = {"pattern": QWEN_PATTERN, "normalizer": None, "added_tokens": ["<|end|>"], "eos_token": "<|end|>"}


def write(folder: Path, tokens: list[bytes], settings: object = SETTINGS) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (folder / "x.tiktoken").write_bytes(b"".join(lines))
    if settings is not None:
        (folder / "x.tiktoken.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder / "x.tiktoken"


def test_settings_beside_the_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, TOKENS))
    assert tokenizer.vocab_size == len(TOKENS) + 1
    assert tokenizer.eos_id == len(TOKENS)
    assert tokenizer.token_bytes(tokenizer.encode("abc abcd é<|end|>"))[:3] == [b"abc", b" ", b"abc"]
    assert tokenizer.decode(tokenizer.encode("abc abcd é<|end|>")) == "abc abcd é<|end|>"
    assert tokenizer.encode_prompt("a<|end|>").tolist() == [ord("a"), len(TOKENS)]


def test_saved_form_is_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, TOKENS))
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("tokens", "settings", "reason"),
    [
        (TOKENS, None, "unknown tiktoken file; define its split pattern"),
        (TOKENS[1:], SETTINGS, "no token for 1 of the 256 bytes"),
        (TOKENS, {"normalizer": "NFC"}, "must be an object with a pattern"),
        (TOKENS, {**SETTINGS, "patern": "x"}, "must be an object with a pattern"),
        (TOKENS, {**SETTINGS, "normalizer": "NFKC"}, "normalizer"),
        (TOKENS, {**SETTINGS, "pattern": "("}, "pattern"),
        (TOKENS, {**SETTINGS, "added_tokens": ["\ud800"]}, "half a surrogate pair"),
        (TOKENS, {**SETTINGS, "added_tokens": [f"<{n}>" for n in range(20_000)]}, "more than 16384 added tokens"),
        (
            TOKENS[:256] + [b"a" * n for n in range(2, 2000)],
            SETTINGS,
            "more pairs of its tokens are tokens than of any",
        ),
    ],
)
def test_broken_files(tmp_path: Path, tokens: list[bytes], settings: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(write(tmp_path, tokens, settings))


@pytest.mark.parametrize(("cut", "reason"), [(3, "two tokens have the same rank"), (4, f"line {len(TOKENS)} is not")])
def test_a_file_cut_off_is_noticed(tmp_path: Path, cut: int, reason: str) -> None:
    file = write(tmp_path, TOKENS)
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(file)


def test_settings_that_are_no_json(tmp_path: Path) -> None:
    file = write(tmp_path, TOKENS)
    file.with_name("x.tiktoken.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.tiktoken\.json"):
        load_tokenizer(file)
