"""Texts that two tokenizers spell differently in places: all the rest is aligned, and a cut keeps what fits."""

from __future__ import annotations

import io
import json
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_tide.bridge import Aligned, Bridge, TextTokenizer, align_text, load_tokenizer
from megatron_tide.data.encode import Encoded, Encoder, TokenizerSettings
from tests.support.tokenizers import TEXTS

PLAIN = " ".join(TEXTS[3:5] * 14)[:2000]
CHANGED = {
    "accents at both ends": (normalizers.NFC(), "e\u0301" + PLAIN + "e\u0301", 6),
    "ohm signs": (normalizers.NFC(), PLAIN + "\u2126" + PLAIN + "\u2126" + PLAIN, 6),
    "hangul jamo": (normalizers.NFC(), PLAIN + "\u1112\u1161\u11ab\u1100\u1173\u11af" + PLAIN, 18),
    "ligature": (normalizers.NFKC(), PLAIN + "\n\ufb01\n" + PLAIN, 5),
    "full-width": (normalizers.NFKC(), PLAIN + "\n\uff21\uff22\n" + PLAIN, 6),
    "one letter to twelve": (normalizers.NFKC(), PLAIN + "\n\u334d\n" + PLAIN, 3),
    "decomposed": (normalizers.NFD(), PLAIN + "\n\u00e9 \ud55c\n" + PLAIN, 6),
    "line ends": (normalizers.Replace("\r\n", "\n"), (PLAIN[:100] + "\r\n") * 20, 40),
    "stripped": (normalizers.Strip(), "  " + PLAIN.strip() + "\n", 3),
    "deleted": (normalizers.Replace("\u200b", ""), PLAIN + "\u200b" + PLAIN, 3),
}

Variant = Callable[[normalizers.Normalizer], TextTokenizer]


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory, folders: Mapping[str, Path]) -> Variant:
    """The byte-level tokenizer with a normaliser in front."""

    def make(normalizer: normalizers.Normalizer) -> TextTokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["student"])
        tokenizer.backend_tokenizer.normalizer = normalizer
        folder = tmp_path_factory.mktemp("variant")
        tokenizer.save_pretrained(folder)
        return load_tokenizer(folder)

    return make


def assert_chunks_are_equal_bytes(student: TextTokenizer, teacher: TextTokenizer, aligned: Aligned) -> None:
    sides = []
    for tokenizer, ids, chunk in (
        (student, aligned.student_ids, aligned.student_chunk),
        (teacher, aligned.teacher_ids, aligned.teacher_chunk),
    ):
        inside = chunk[chunk >= 0]
        assert set(inside.tolist()) == set(range(aligned.n_chunks))
        assert (np.diff(inside) >= 0).all()
        spelled = [b""] * aligned.n_chunks
        for piece, number in zip(tokenizer.token_bytes(ids), chunk.tolist()):
            if number >= 0:
                spelled[number] += piece
        sides.append(spelled)
    assert sides[0] == sides[1]


@pytest.mark.parametrize("other", ["teacher", "prefixed"])
@pytest.mark.parametrize(("normalizer", "text", "most"), CHANGED.values(), ids=CHANGED)
def test_only_the_changed_letters_are_not_covered(
    variant: Variant,
    tokenizers: Mapping[str, TextTokenizer],
    other: str,
    normalizer: normalizers.Normalizer,
    text: str,
    most: int,
) -> None:
    pair = variant(normalizer), tokenizers[other]
    for student, teacher in (pair, pair[::-1]):
        aligned = align_text(student, teacher, text)
        assert aligned.total_bytes == len(text.encode())
        assert 0 < aligned.total_bytes - aligned.covered_bytes <= most
        assert_chunks_are_equal_bytes(student, teacher, aligned)


@pytest.mark.parametrize("strips", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_added_tokens_that_take_spaces_cost_only_themselves(
    tmp_path: Path, folders: Mapping[str, Path], tokenizers: Mapping[str, TextTokenizer], strips: dict[str, bool]
) -> None:
    changed = PreTrainedTokenizerFast.from_pretrained(folders["student"])
    changed.add_tokens([hf.AddedToken("<tag>", normalized=False, **strips)])
    changed.save_pretrained(tmp_path)
    text = PLAIN + "  <tag>  " + PLAIN + " <tag> " + PLAIN
    aligned = align_text(load_tokenizer(tmp_path), tokenizers["teacher"], text)
    assert 0 < aligned.total_bytes - aligned.covered_bytes <= 18  # the spaces around may be in tokens of the teacher
    assert_chunks_are_equal_bytes(load_tokenizer(tmp_path), tokenizers["teacher"], aligned)


def test_words_are_aligned_though_a_side_drops_and_respells_the_spaces_before_them(
    tmp_path: Path, folders: Mapping[str, Path], tokenizers: Mapping[str, TextTokenizer]
) -> None:
    """As XLM-R's and T5's do: their offsets leave the spaces out, while others have spaces of their own (digits)."""
    changed = PreTrainedTokenizerFast.from_pretrained(folders["student"])
    pieces = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)]
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    changed.save_pretrained(tmp_path)
    text = "x 1 2 33 4 yy 5 6 z " * 20
    for pair in ((load_tokenizer(tmp_path), tokenizers["teacher"]), (tokenizers["student"], load_tokenizer(tmp_path))):
        for student, teacher in (pair, pair[::-1]):
            aligned = align_text(student, teacher, text)
            assert aligned.total_bytes - aligned.covered_bytes <= 2  # the space at the end
            assert_chunks_are_equal_bytes(student, teacher, aligned)


UNITS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
    | st.sampled_from(["e\u0301", "\u2126", "\u1112\u1161\u11ab", "\ufb01", "\uff21", "words of text", "\u4e16"]),
    max_size=12,
)


@pytest.fixture(scope="module")
def forms(variant: Variant) -> Mapping[str, TextTokenizer]:
    return {"NFC": variant(normalizers.NFC()), "NFKC": variant(normalizers.NFKC()), "NFD": variant(normalizers.NFD())}


@given(units=UNITS, form=st.sampled_from(["NFC", "NFKC", "NFD"]), other=st.sampled_from(["teacher", "prefixed"]))
@settings(max_examples=300, deadline=None)
def test_any_text_is_covered_but_for_the_changed_letters(
    tokenizers: Mapping[str, TextTokenizer], forms: Mapping[str, TextTokenizer], units: list[str], form: str, other: str
) -> None:
    """Units between full stops are normalised each on its own, so the changed ones are known."""
    units = [unit.replace("\u2581", " ") for unit in units]  # SentencePiece cannot tell its mark from a space
    text = ".".join(units)
    student, teacher = forms[form], tokenizers[other]
    aligned = align_text(student, teacher, text)
    assert_chunks_are_equal_bytes(student, teacher, aligned)
    spans = [side.spans(text) for side in (student, teacher)]
    for side, found in zip((student, teacher), spans):
        assert len(found) == len(side.encode(text))
        assert (np.diff(found, axis=0) >= 0).all()
        assert ((found >= 0) & (found <= len(text.encode()))).all()
    level = [
        place
        for place in range(len(text.encode()) + 1)
        if not any(start < place < end for found in spans for start, end in found.tolist())
    ]
    changed, place = set(), 0
    for unit in units:
        end = place + len(unit.encode())
        if _normalised(form, unit) != unit:
            # A token that holds a changed letter is unaligned as a whole, up to where tokens of both sides end.
            first, last = max(at for at in level if at <= place), min(at for at in level if at >= end)
            changed |= set(range(first, last))
        place = end + 1
    assert aligned.total_bytes - aligned.covered_bytes <= len(changed)
    if not changed:
        assert aligned.covered_bytes == aligned.total_bytes


def _normalised(form: str, unit: str) -> str:
    """As the tokenizers' library does it, whose Unicode tables may be of another version than Python's."""
    python = unicodedata.normalize(form, unit)  # type: ignore[arg-type]
    return getattr(normalizers, form)().normalize_str(unit) if python == unit else python


@pytest.mark.parametrize("length", [64, 128])
def test_a_cut_keeps_all_that_fits(variant: Variant, tokenizers: Mapping[str, TextTokenizer], length: int) -> None:
    student, teacher = variant(normalizers.NFC()), tokenizers["teacher"]
    bridge = Bridge.build(student, teacher, TEXTS)
    sides = [TokenizerSettings(tokenizer=side, length=length, block=8) for side in (student, teacher)]
    encoder = Encoder(student=sides[0], teacher=sides[1], bridge=bridge)
    # Letters that differ at the start, at the end and, without end, in the middle.
    for response in ("e\u0301" + PLAIN + "e\u0301", "some words " + "e\u0301" * 400 + " some words"):
        messages = [{"role": "user", "content": "Do."}, {"role": "assistant", "content": response}]
        (row,) = encoder.encode_rows([(0, messages)])
        assert isinstance(row, Encoded)
        assert row.sample.teacher is not None
        assert row.truncated
        used = [len(row.sample.student.ids), len(row.sample.teacher.ids)]
        assert max(used) <= length
        assert max(used) >= length - 8  # a chunk ends where a word does


def gemma_like(folder: Path) -> Path:
    """Runs of spaces are pieces of the model, and listed as added tokens too; in both forms that Gemma comes in."""
    names = ["<unk>", "<s>", "</s>", "\u2581", "\u2581\u2581", "\n\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {name: n for n, name in enumerate([*names, *"abcdefghijklmnopqrstuvwxyz:()\n"])}
    raw = hf.Tokenizer(hf.models.BPE(vocabulary, [("\u2581", "\u2581"), ("\n", "\n")], byte_fallback=True))
    raw.normalizer = normalizers.Replace(" ", "\u2581")
    raw.decoder = hf.decoders.Sequence([hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback()])
    raw.add_tokens([hf.AddedToken(one, normalized=False) for one in ("\u2581\u2581", "\n\n", "beside")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    wrapped.save_pretrained(folder / "fast")
    own, made = folder / "own", io.BytesIO()
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=made, vocab_size=350, byte_fallback=True, minloglevel=2,
        user_defined_symbols=["\u2581\u2581", "\n\n"], control_symbols=["<|end|>"], **rules,
    )  # fmt: skip
    own.mkdir()
    (own / "tokenizer.model").write_bytes(made.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())
    added = {pieces.piece_to_id(one): {"content": one, "special": False} for one in ("\u2581\u2581", "\n\n", "<|end|>")}
    (own / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return folder


def test_added_tokens_that_repeat_pieces_are_the_text_of_the_pieces(
    tmp_path: Path, tokenizers: Mapping[str, TextTokenizer]
) -> None:
    text = "def f():\n    return (x)\n\n\n  beside"
    for name in ("fast", "own"):
        found = load_tokenizer(gemma_like(tmp_path / name) / name)
        strings = [found.id_to_token(one) for one in found.encode(text)]
        assert strings.count("\u2581\u2581") == 3
        assert strings.count("\n\n") == 1
        assert found.decode(found.encode(text)) == text
        assert found.encode_with_bytes(text).data == text.encode()
        for pair in ((found, tokenizers["student"]), (tokenizers["student"], found)):
            assert align_text(*pair, text).covered_bytes == len(text)
        ordinary = {found.id_to_token(one) for one in np.flatnonzero(found.is_ordinary())}
        assert {"\u2581\u2581", "\n\n"} <= ordinary
        assert not {"beside", "<|end|>"} & ordinary
    fast = load_tokenizer(tmp_path / "fast" / "fast")
    numbers = {fast.id_to_token(one): one for one in range(fast.vocab_size)}
    assert [fast.may_be_mask(numbers[one]) for one in ("a", "\n\n", "beside", "</s>")] == [False, True, True, True]
