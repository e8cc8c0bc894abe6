"""The bridge between tokenizers that real models use: Qwen3, Mistral's SentencePiece v1 and v3, DeepSeek."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf

from megatron_tide.bridge import Bridge, TextTokenizer, align_text, load_tokenizer
from megatron_tide.bridge.tiktoken import QWEN_PATTERN
from tests.bridge.test_bridge import assert_tiled
from tests.bridge.texts import DECOMPOSED, HARD_TEXTS
from tests.reference import tiktoken as reference
from tests.support.real_tokenizers import DEEPSEEK, DEEPSEEK_CONFIG, MISTRAL_V1, MISTRAL_V3, QWEN3, fetch

pytestmark = pytest.mark.slow
CODE = inspect.getsource(textwrap) + inspect.getsource(json)


@pytest.fixture(scope="module")
def qwen3() -> TextTokenizer:
    return load_tokenizer(fetch(QWEN3))


@pytest.fixture(scope="module")
def mistral_v1() -> TextTokenizer:
    return load_tokenizer(fetch(MISTRAL_V1))


@pytest.fixture(scope="module")
def mistral_v3() -> TextTokenizer:
    return load_tokenizer(fetch(MISTRAL_V3).parent)


@pytest.fixture(scope="module")
def deepseek() -> TextTokenizer:
    fetch(DEEPSEEK_CONFIG)
    return load_tokenizer(fetch(DEEPSEEK).parent)


NAMES = ("qwen3", "mistral_v1", "mistral_v3", "deepseek")


@pytest.mark.parametrize("pair", permutations(NAMES, 2), ids="-".join)
def test_chunks_tile_hard_texts(request: pytest.FixtureRequest, pair: tuple[str, str]) -> None:
    student, teacher = (request.getfixturevalue(name) for name in pair)
    for text in (*HARD_TEXTS.values(), CODE):
        assert_tiled(align_text(student, teacher, text), student, teacher, text)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_spell_hard_texts_without_special_ones(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    strings = [tokenizer.id_to_token(token) for token in sorted(tokenizer.special_ids)]
    for text in (*HARD_TEXTS.values(), CODE, "x".join(string for string in strings[:40] if string)):
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(ids)) == text.encode("utf-8")
        assert not set(ids.tolist()) & tokenizer.special_ids
        assert tokenizer.byte_lengths(ids).sum() == len(text.encode("utf-8"))


@pytest.mark.parametrize(
    ("name", "vocabulary", "eos"),
    [
        ("qwen3", 151669, "<|im_end|>"),
        ("mistral_v1", 32000, "</s>"),
        ("mistral_v3", 32768, "</s>"),
        ("deepseek", 129280, "<｜end▁of▁sentence｜>"),
    ],
)
def test_known_facts(request: pytest.FixtureRequest, name: str, vocabulary: int, eos: str) -> None:
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.vocab_size == vocabulary
    assert tokenizer.id_to_token(tokenizer.eos_id) == eos
    with pytest.raises(ValueError, match="no mask token"):
        _ = tokenizer.mask_id


def test_qwen3_special_ids(qwen3: TextTokenizer) -> None:
    known = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<think>": 151667}
    for string, index in known.items():
        assert qwen3.encode_prompt(string).tolist() == [index]
    # The markers of turns never come from text; <think> is text to Qwen3, and one token.
    assert qwen3.encode("<think>").tolist() == [151667]
    assert 151667 not in qwen3.special_ids
    assert 151645 not in qwen3.encode("<|im_end|>")


def test_qwen3_mask_token_is_no_text(qwen3: TextTokenizer) -> None:
    masked = load_tokenizer(fetch(QWEN3), mask_token="<tool_response>")
    assert masked.mask_id == 151665
    assert qwen3.encode("a <tool_response>").tolist().count(151665) == 1
    assert masked.encode("a <tool_response>").tolist().count(151665) == 0
    assert masked.fingerprint != qwen3.fingerprint


def test_tiktoken_file_encodes_by_definition(qwen3: TextTokenizer) -> None:
    ranks = reference.read_ranks(fetch(QWEN3))
    for name, text in HARD_TEXTS.items():
        if name != "markup":
            assert qwen3.encode(text).tolist() == reference.encode(text, ranks, QWEN_PATTERN), name
    assert qwen3.encode(CODE).tolist() == reference.encode(CODE, ranks, QWEN_PATTERN)
    assert qwen3.encode(DECOMPOSED).tolist() == reference.encode(DECOMPOSED, ranks, QWEN_PATTERN)


def test_sentencepiece_and_tokenizer_json_encode_as_their_libraries_do(
    mistral_v3: TextTokenizer, deepseek: TextTokenizer
) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(fetch(MISTRAL_V3)))
    published = hf.Tokenizer.from_file(str(fetch(DEEPSEEK)))
    for name, text in (*HARD_TEXTS.items(), ("source", CODE)):
        assert mistral_v3.encode(text).tolist() == model.encode(text)
        if name != "markup":
            assert deepseek.encode(text).tolist() == published.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("student", "teacher", "share"), [("qwen3", "deepseek", 0.82), ("mistral_v1", "mistral_v3", 0.97)]
)
def test_coverage_and_one_to_one_chunks_on_code(
    request: pytest.FixtureRequest, student: str, teacher: str, share: float
) -> None:
    bridge = Bridge.build(request.getfixturevalue(student), request.getfixturevalue(teacher), [CODE])
    sample = bridge.manifest["sample"]
    assert bridge.coverage == 1.0
    assert sample["one_to_one"] / sample["chunks"] >= share
    assert not bridge.shared


def test_qwen3_normalises_and_mistral_does_not(qwen3: TextTokenizer, mistral_v1: TextTokenizer) -> None:
    assert qwen3.encode_with_bytes(DECOMPOSED).data == "café au lait, Ångström".encode()
    aligned = align_text(qwen3, mistral_v1, f"before {DECOMPOSED} after")
    assert 0 < aligned.covered_bytes < aligned.total_bytes
    assert (aligned.student_chunk == -2).any()
    assert (aligned.teacher_chunk == -2).any()


def test_qwen3_relatives_are_shared(tmp_path: Path, qwen3: TextTokenizer, make_relative: Callable[..., Path]) -> None:
    relative = load_tokenizer(make_relative(tmp_path))
    bridge = Bridge.build(relative, qwen3, [CODE])
    assert bridge.shared
    assert bridge.shared_prefix == 151665
    assert relative.id_to_token(relative.mask_id) == "<|mask|>"
    assert np.array_equal(bridge.student_ids, bridge.teacher_ids)


@pytest.fixture
def make_relative(qwen3: TextTokenizer) -> Callable[[Path], Path]:
    """A tokenizer of Qwen's family: the same ranks, of the added tokens the first 22 (as Qwen2.5 has), then a mask."""

    def make(folder: Path) -> Path:
        settings = {
            "pattern": QWEN_PATTERN,
            "normalizer": "NFC",
            "added_tokens": [qwen3.id_to_token(index) for index in range(151643, 151657)],
            "plain_added_tokens": [qwen3.id_to_token(index) for index in range(151657, 151665)] + ["<|mask|>"],
            "eos_token": "<|im_end|>",
            "mask_token": "<|mask|>",
        }
        (folder / "family.tiktoken").write_bytes(fetch(QWEN3).read_bytes())
        (folder / "family.tiktoken.json").write_text(json.dumps(settings), encoding="utf-8")
        return folder

    return make
