"""tiktoken-style files: one base64 token and its rank per line, read into a Hugging Face byte-level BPE.

Such a file contains only ranks. Normalisation, splitting and added tokens are built in for Qwen's file (recognised by
its content); any other needs a settings file next to it, ``NAME.tiktoken.json``:
``{"pattern": "...", "normalizer": "NFC" or null, "added_tokens": ["<|im_end|>", ...], "eos_token": "...", ...}``;
ordinary text may become ``plain_added_tokens``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megatron_tide.bounds import ADDED_TOKENS, MERGED_BYTES, TOKEN_BYTES, check_id
from megatron_tide.bridge.byte_table import byte_level_string
from megatron_tide.files import check_form, read_json, read_whole

SETTINGS_SUFFIX = ".json"
NORMALIZERS = {None: None, "NFC": normalizers.NFC()}
SETTINGS: dict[str, Any] = {"pattern": str, "normalizer?": (None, str)}
SETTINGS |= {"added_tokens?": [str], "plain_added_tokens?": [str], "chat_template?": (None, str)}
SETTINGS |= {f"{role}_token?": (None, str) for role in ("eos", "pad", "bos", "mask")}
SETTINGS_KEYS = {key.removesuffix("?") for key in SETTINGS}

# Qwen2.5 and Qwen3: the split pattern, and the 26 tokens after the 151,643 ranks.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
)
_QWEN_PLAIN = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
)
QWEN_SETTINGS: dict[str, Any] = {
    "pattern": QWEN_PATTERN,
    "normalizer": "NFC",
    "added_tokens": _QWEN_SPECIAL.split(),
    "plain_added_tokens": _QWEN_PLAIN.split(),
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
}
KNOWN_FILES = {"b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186": QWEN_SETTINGS}
"""sha256 of a file's content -> its settings."""


def read_tiktoken(file: Path) -> Any:
    """A transformers tokenizer for the file; ValueError for an invalid line, missing bytes, or unknown settings."""
    from transformers import PreTrainedTokenizerFast

    content = read_whole(file)
    ranks = _read_ranks(content, file)
    settings = _settings(content, file)
    tokenizer = tokenizers.Tokenizer(_bpe(ranks, file))
    tokenizer.normalizer = NORMALIZERS[settings.get("normalizer")]
    split = pre_tokenizers.Split(_regex(settings["pattern"], file), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for names, special in ((settings.get("added_tokens", []), True), (settings.get("plain_added_tokens", []), False)):
        tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=special) for token in names])
    roles = {key: value for key, value in settings.items() if key.endswith("_token") or key == "chat_template"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def _read_ranks(content: bytes, file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{file}: line {number} is not a base64 token with its rank; download the file again"
            ) from error
    for token, index in ranks.items():
        check_id(str(file), repr(token[:20]), index)
        if len(token) > TOKEN_BYTES:
            raise ValueError(f"{file}: a token of {len(token)} bytes, more than {TOKEN_BYTES}; fetch the file again")
    if len(set(ranks.values())) < len(ranks):
        raise ValueError(f"{file}: two tokens have the same rank (truncated file?); download the file again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"{file}: has no token for {len(missing)} of the 256 bytes; download the file again")
    return ranks


def _settings(content: bytes, file: Path) -> dict[str, Any]:
    beside = file.with_name(file.name + SETTINGS_SUFFIX)
    if beside.exists():
        settings = read_json(beside, "fix the settings")
        if "pattern" not in settings or settings.keys() - SETTINGS_KEYS:
            raise ValueError(
                f"{beside}: must be an object with a pattern and no keys other than {sorted(SETTINGS_KEYS)}"
            )
        check_form(settings, SETTINGS, f"{beside}:")
        texts = [*settings.get("added_tokens", []), *settings.get("plain_added_tokens", []), *settings.values()]
        if any(isinstance(text, str) and not 0 < len(text) <= TOKEN_BYTES * 16 for text in texts):
            raise ValueError(f"{beside}: a text that is empty or too long; fix the settings")
        if any(isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text) for text in texts):
            raise ValueError(f"{beside}: half a surrogate pair, which is no text; fix the settings")
        if len(texts) > ADDED_TOKENS:
            raise ValueError(f"{beside}: more than {ADDED_TOKENS} added tokens; fix the settings")
        if settings.get("normalizer") not in NORMALIZERS:
            raise ValueError(f"{beside}: normalizer must be one of {[*NORMALIZERS]}, not {settings['normalizer']!r}")
        return settings
    known = KNOWN_FILES.get(hashlib.sha256(content).hexdigest())
    if known is None:
        raise ValueError(f"{file}: unknown tiktoken file; define its split pattern in {beside.name}")
    return known


def _regex(pattern: str, file: Path) -> tokenizers.Regex:
    try:
        return tokenizers.Regex(pattern)
    except Exception as error:
        # tokenizers has no narrower type for it.
        raise ValueError(
            f"{file}: the pattern in its settings is not a regular expression ({error}); fix it"
        ) from error


def _bpe(ranks: dict[bytes, int], file: Path) -> models.BPE:
    """The merges that give the ranks' own order: a token's halves are every pair of tokens that joins to it."""
    merges: list[tuple[int, int, int, bytes, bytes]] = []
    room = MERGED_BYTES
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], left, right))
                room -= len(token)
        if room < 0:
            raise ValueError(
                f"{file}: more pairs of its tokens are tokens than of any vocabulary; fetch the file again"
            )
    merges.sort()
    vocabulary = {byte_level_string(token): rank for token, rank in ranks.items()}
    pairs = [(byte_level_string(left), byte_level_string(right)) for *_, left, right in merges]
    # tiktoken encodes a complete word that is a token as that token, before any merging.
    return models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False, ignore_merges=True)
