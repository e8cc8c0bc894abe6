"""The bridge: alignment of whole texts, the vocabulary map, sharing, the artifact and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from megatron_tide.bridge import Aligned, Bridge, TextTokenizer, align_text, align_texts, load_tokenizer
from megatron_tide.bridge.artifact import _map_fingerprint
from megatron_tide.bridge.build import summary
from megatron_tide.files import fingerprint
from tests.bridge.texts import DECOMPOSED, HARD_TEXTS
from tests.support.tokenizers import TEXTS, train_byte_bpe

PAIRS = [("student", "teacher"), ("student", "prefixed"), ("prefixed", "student"), ("student", "student")]


def assert_tiled(aligned: Aligned, student: TextTokenizer, teacher: TextTokenizer, text: str) -> None:
    """Every byte of the text lies in a chunk, chunks spell the same bytes on both sides and are as short as can be."""
    data = text.encode("utf-8")
    assert (aligned.covered_bytes, aligned.total_bytes) == (len(data), len(data))
    spelled, ends = [], []
    for tokenizer, ids, chunk in (
        (student, aligned.student_ids, aligned.student_chunk),
        (teacher, aligned.teacher_ids, aligned.teacher_chunk),
    ):
        pieces = tokenizer.token_bytes(ids)
        assert chunk.tolist() == sorted(chunk.tolist())
        assert set(chunk.tolist()) == set(range(aligned.n_chunks))
        groups: list[bytes] = [b""] * aligned.n_chunks
        for piece, number in zip(pieces, chunk.tolist()):
            groups[number] += piece
        spelled.append(groups)
        ends.append(set(np.cumsum([len(piece) for piece in pieces]).tolist()) - {0})
    assert spelled[0] == spelled[1]
    assert b"".join(spelled[0]) == data
    assert set(np.cumsum([len(group) for group in spelled[0]]).tolist()) == (ends[0] & ends[1] if data else set())


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
def test_chunks_tile_hard_texts(tokenizers: Mapping[str, TextTokenizer], pair: tuple[str, str], text: str) -> None:
    student, teacher = (tokenizers[name] for name in pair)
    assert_tiled(align_text(student, teacher, text), student, teacher, text)


@given(text=st.text(max_size=80))
@settings(max_examples=200)
def test_chunks_tile_any_text(tokenizers: Mapping[str, TextTokenizer], text: str) -> None:
    text = text.replace("\u2581", " ")
    for pair in PAIRS:
        student, teacher = (tokenizers[name] for name in pair)
        assert_tiled(align_text(student, teacher, text), student, teacher, text)


@pytest.fixture(scope="module")
def bridge(tokenizers: Mapping[str, TextTokenizer]) -> Bridge:
    return Bridge.build(tokenizers["student"], tokenizers["teacher"], TEXTS)


def test_map_pairs_spell_the_same_bytes(tokenizers: Mapping[str, TextTokenizer], bridge: Bridge) -> None:
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    assert bridge.student_ids.dtype == bridge.teacher_ids.dtype == np.int64
    assert (np.diff(bridge.student_ids) > 0).all()
    assert len(set(bridge.teacher_ids.tolist())) == len(bridge.teacher_ids) == bridge.manifest["mapped"]
    pairs = dict(zip(bridge.student_ids.tolist(), bridge.teacher_ids.tolist()))
    assert pairs.pop(student.eos_id) == teacher.eos_id
    for left, right in pairs.items():
        assert student.id_to_bytes(left) == teacher.id_to_bytes(right) not in (None, b"")
    # Nothing that both can spell is left out.
    both = [
        {spelled for index in range(side.vocab_size) if (spelled := side.id_to_bytes(index))}
        for side in (student, teacher)
    ]
    assert {student.id_to_bytes(left) for left in pairs} == both[0] & both[1]


def test_map_prefers_what_text_becomes_over_byte_fallback(
    tokenizers: Mapping[str, TextTokenizer], bridge: Bridge
) -> None:
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    pairs = dict(zip(bridge.student_ids.tolist(), bridge.teacher_ids.tolist()))
    letter = int(student.encode("e")[0])
    assert pairs[letter] == int(teacher.encode("e")[0])
    assert teacher.id_to_token(pairs[letter]) == "e"


@pytest.mark.parametrize("pair", [("student", "teacher"), ("prefixed", "student")], ids="-".join)
def test_a_teacher_token_is_sent_to_the_longest_student_token_that_it_begins_with(
    tokenizers: Mapping[str, TextTokenizer], pair: tuple[str, str]
) -> None:
    student, teacher = (tokenizers[name] for name in pair)
    bridge = Bridge.build(student, teacher, TEXTS)
    spelled = {index: student.id_to_bytes(index) for index in np.flatnonzero(student.is_ordinary()).tolist()}
    equal = dict(zip(bridge.teacher_ids.tolist(), bridge.student_ids.tolist()))
    kinds = {"one_token": 0, "several_tokens": 0, "none": 0}
    for index in range(teacher.vocab_size):
        data, found = teacher.id_to_bytes(index), int(bridge.prefix_ids[index])
        if index in equal:
            assert found == equal[index]
        begins = [spelled[s] for s in spelled if data and spelled[s] and data.startswith(spelled[s])]
        if not (teacher.is_ordinary()[index] and begins):
            assert found == (student.eos_id if index == teacher.eos_id else -1)
        else:
            assert spelled[found] == max(begins, key=len)
        whole = found >= 0 and (index == teacher.eos_id or data == student.id_to_bytes(found))
        kinds["none" if found < 0 else "one_token" if whole else "several_tokens"] += 1
    assert kinds["several_tokens"] > 0
    shares = bridge.manifest["sample"]["spelling"]
    assert shares["vocabulary"] == pytest.approx({name: n / teacher.vocab_size for name, n in kinds.items()})
    ids = np.concatenate([teacher.encode(text) for text in TEXTS])
    reached = [int(bridge.prefix_ids[i]) >= 0 for i in ids]
    assert shares["sample"]["one_token"] + shares["sample"]["several_tokens"] == pytest.approx(np.mean(reached))
    line = f"{shares['sample']['one_token']:.4f} / {shares['sample']['several_tokens']:.4f} in the sample"
    assert line in summary(bridge)


def test_a_bridge_of_an_earlier_version_has_no_prefixes_and_is_the_same_bridge(tmp_path: Path, bridge: Bridge) -> None:
    bridge.save(tmp_path)
    record = json.loads((tmp_path / "manifest.json").read_text())
    del record["manifest"]["prefix_map_sha256"], record["manifest"]["sample"]["spelling"]
    record["sha256"] = fingerprint(record["manifest"])
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    maps = load_file(tmp_path / "vocab_map.safetensors")
    assert np.array_equal(maps.pop("prefix_ids"), bridge.prefix_ids)
    save_file(maps, tmp_path / "vocab_map.safetensors")
    loaded = Bridge.load(tmp_path)
    assert (loaded.prefix_ids, loaded.fingerprint) == (None, bridge.fingerprint)
    assert "one / several" not in summary(loaded)


def test_one_to_one_chunks_of_a_text_are_mapped(tokenizers: Mapping[str, TextTokenizer], bridge: Bridge) -> None:
    aligned = align_text(tokenizers["student"], tokenizers["teacher"], TEXTS[0])
    pairs = dict(zip(bridge.student_ids.tolist(), bridge.teacher_ids.tolist()))
    single = 0
    for chunk in range(aligned.n_chunks):
        left = aligned.student_ids[aligned.student_chunk == chunk]
        right = aligned.teacher_ids[aligned.teacher_chunk == chunk]
        if len(left) == len(right) == 1:
            assert pairs[int(left[0])] == int(right[0])
            single += 1
    assert single == aligned.one_to_one() > 0


def test_equal_tokenizers_are_shared(tokenizers: Mapping[str, TextTokenizer]) -> None:
    for name, tokenizer in tokenizers.items():
        bridge = Bridge.build(tokenizer, tokenizer, TEXTS)
        assert (bridge.shared, bridge.shared_prefix) == (True, tokenizer.vocab_size), name
        assert bridge.student_ids.tolist() == bridge.teacher_ids.tolist() == list(range(tokenizer.vocab_size))
        aligned = bridge.align_text(" and one two")
        assert aligned.one_to_one() == aligned.n_chunks == len(aligned.student_ids)
        assert aligned.student_chunk.tolist() == aligned.teacher_chunk.tolist() == list(range(aligned.n_chunks))
        assert bridge.manifest["sample"]["one_to_one"] == bridge.manifest["sample"]["chunks"]
        assert bridge.manifest["sample"]["chunks"] == bridge.manifest["sample"]["student_tokens"]


def relative(folder: Path, base: Path, extra: list[str], special: bool = True) -> TextTokenizer:
    """The tokenizer of ``base`` with more added tokens, as models of one family have."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_tokens([hf.AddedToken(token, special=special, normalized=False) for token in extra])
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("special", [True, False])
def test_other_added_tokens_leave_tokenizers_shared(tmp_path: Path, folders: Mapping[str, Path], special: bool) -> None:
    base = load_tokenizer(folders["student"])
    padded = relative(tmp_path / "padded", folders["student"], [f"<extra_{n}>" for n in range(9)], special)
    other = relative(tmp_path / "other", folders["student"], ["<extra_0>", "<extra_1>", "<other>"], special)
    for student, teacher, prefix in ((base, padded, base.vocab_size), (padded, other, base.vocab_size + 2)):
        bridge = Bridge.build(student, teacher, TEXTS)
        assert (bridge.shared, bridge.shared_prefix) == (True, prefix)
        assert bridge.student_ids.tolist() == bridge.teacher_ids.tolist() == list(range(prefix))


def test_prefix_is_checked_id_by_id(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    spec = json.loads((folders["student"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = spec["model"]["vocab"]
    strings = {index: token for token, index in vocabulary.items()}
    vocabulary[strings[300]], vocabulary[strings[301]] = 301, 300
    swapped = tmp_path / "swapped"
    PreTrainedTokenizerFast.from_pretrained(folders["student"]).save_pretrained(swapped)
    (swapped / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    student = load_tokenizer(folders["student"])
    bridge = Bridge.build(student, load_tokenizer(swapped), TEXTS)
    assert (bridge.shared, bridge.shared_prefix) == (False, 300)
    pairs = dict(zip(bridge.student_ids.tolist(), bridge.teacher_ids.tolist()))
    assert (pairs[300], pairs[301], pairs[299]) == (301, 300, 299)


def test_same_vocabulary_split_otherwise_is_not_shared(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    spec = json.loads((folders["student"] / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"]["merges"] = spec["model"]["merges"][:20]
    PreTrainedTokenizerFast.from_pretrained(folders["student"]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    student = load_tokenizer(folders["student"])
    bridge = Bridge.build(student, load_tokenizer(tmp_path), TEXTS)
    assert bridge.shared_prefix == student.vocab_size
    assert not bridge.shared


def normalising(folder: Path, base: Path) -> TextTokenizer:
    """The tokenizer of ``base``, composing characters first (NFC) as Qwen's does."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.backend_tokenizer.normalizer = hf.normalizers.NFC()
    tokenizer.save_pretrained(folder)
    return load_tokenizer(folder)


def test_normalisation_on_one_side_uncovers_the_middle(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    student, teacher = normalising(tmp_path, folders["student"]), load_tokenizer(folders["teacher"])
    text = "plain words, then " + DECOMPOSED + ", then plain words"
    aligned = align_text(student, teacher, text)
    assert aligned.total_bytes == len(text.encode("utf-8"))
    assert 0 < aligned.covered_bytes < aligned.total_bytes
    sides = []
    for tokenizer, ids, chunk in (
        (student, aligned.student_ids, aligned.student_chunk),
        (teacher, aligned.teacher_ids, aligned.teacher_chunk),
    ):
        assert set(chunk.tolist()) == {-2, *range(aligned.n_chunks)}
        pieces = tokenizer.token_bytes(ids)
        sides.append(
            [b"".join(p for p, c in zip(pieces, chunk.tolist()) if c == number) for number in range(aligned.n_chunks)]
        )
    assert sides[0] == sides[1]
    covered = b"".join(sides[0]).decode("utf-8")
    assert covered.startswith("plain words")
    assert covered.endswith("then plain words")
    assert "\u0301" not in covered


@pytest.mark.parametrize("same", [True, False])
def test_texts_aligned_at_once_are_each_aligned_alone(tmp_path: Path, folders: Mapping[str, Path], same: bool) -> None:
    student = normalising(tmp_path, folders["student"])
    teacher = student if same else load_tokenizer(folders["prefixed"])
    texts = [TEXTS[0], DECOMPOSED, "", TEXTS[1] + DECOMPOSED + TEXTS[2], " two", TEXTS[3]]
    together = align_texts(student, teacher, texts, same=same)
    assert len(together) == len(texts)
    for text, aligned in zip(texts, together):
        alone = align_text(student, teacher, text, same=same)
        assert {name: np.asarray(value).tolist() for name, value in vars(aligned).items()} == {
            name: np.asarray(value).tolist() for name, value in vars(alone).items()
        }


def test_normalisation_on_both_sides_is_covered(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    student = normalising(tmp_path / "a", folders["student"])
    teacher = normalising(tmp_path / "b", train_byte_bpe(tmp_path / "base", TEXTS, 300))
    aligned = align_text(student, teacher, DECOMPOSED)
    assert aligned.covered_bytes == aligned.total_bytes == len("café au lait, Ångström".encode())


def character_tokenizer(folder: Path, letters: str) -> TextTokenizer:
    """Characters only, with an unknown token for all others: no byte fallback."""
    vocabulary = {"<unk>": 0, "<eos>": 1, "\u2581": 2} | {letter: 3 + place for place, letter in enumerate(letters)}
    tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = hf.decoders.Metaspace(prepend_scheme="never", split=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("unknown_to_both", [True, False])
def test_unknown_characters_are_not_covered(
    tmp_path: Path, tokenizers: Mapping[str, TextTokenizer], unknown_to_both: bool
) -> None:
    student = character_tokenizer(tmp_path, "abc")
    teacher = student if unknown_to_both else tokenizers["teacher"]
    aligned = align_text(student, teacher, "ab世 ca")
    assert (aligned.covered_bytes, aligned.total_bytes) == (5, 8)
    assert aligned.student_chunk.tolist() == [0, 1, -2, 2, 3, 4]


def test_empty_sample_is_refused(tokenizers: Mapping[str, TextTokenizer]) -> None:
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="has no text"):
            Bridge.build(tokenizers["student"], tokenizers["teacher"], texts)


def test_coverage_floor(tmp_path: Path, tokenizers: Mapping[str, TextTokenizer]) -> None:
    bridge = Bridge.build(character_tokenizer(tmp_path, "abc"), tokenizers["teacher"], ["ab世 ca"])
    assert bridge.coverage == 5 / 8
    bridge.require_coverage(0.6)
    with pytest.raises(ValueError, match=r"covers 0.6250 .* less than 0.98"):
        bridge.require_coverage(0.98)


def test_artifact_comes_back_whole(tmp_path: Path, tokenizers: Mapping[str, TextTokenizer], bridge: Bridge) -> None:
    bridge.save(tmp_path)
    loaded = Bridge.load(tmp_path)
    assert loaded.manifest == bridge.manifest
    assert loaded.fingerprint == bridge.fingerprint
    assert (loaded.student_ids == bridge.student_ids).all()
    assert (loaded.teacher_ids == bridge.teacher_ids).all()
    assert (loaded.prefix_ids == bridge.prefix_ids).all()
    with pytest.raises(ValueError, match="call check"):
        loaded.align_text("x")
    loaded.check(tokenizers["student"], tokenizers["teacher"])
    assert loaded.align_text(TEXTS[0]).n_chunks == bridge.align_text(TEXTS[0]).n_chunks
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["manifest.json", "vocab_map.safetensors"]


def test_fingerprint_does_not_follow_names_or_sample(
    tmp_path: Path, folders: Mapping[str, Path], bridge: Bridge
) -> None:
    copy = tmp_path / "copy"
    load_tokenizer(folders["student"]).save(copy)
    again = Bridge.build(load_tokenizer(copy), load_tokenizer(folders["teacher"]), TEXTS[:2])
    assert again.fingerprint == bridge.fingerprint
    assert again.manifest != bridge.manifest


def test_other_tokenizers_are_refused(
    tmp_path: Path, folders: Mapping[str, Path], tokenizers: Mapping[str, TextTokenizer], bridge: Bridge
) -> None:
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    other_mask = load_tokenizer(folders["student"], mask_token="<|im_start|>")
    for pair, what in (
        ((teacher, student), "student tokenizer .* fingerprint"),
        ((student, tokenizers["prefixed"]), "teacher tokenizer .* fingerprint"),
        ((other_mask, teacher), "mask_id is"),
    ):
        with pytest.raises(ValueError, match=what) as caught:
            bridge.check(*pair)
        assert "\n" not in str(caught.value)


def tamper_manifest(folder: Path, key: str, value: object) -> None:
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    record["manifest"][key] = value
    (folder / "manifest.json").write_text(json.dumps(record), encoding="utf-8")


def out_of_range(folder: Path) -> None:
    """Checksums can be made to match; an id that the student has not is refused all the same."""
    maps = load_file(folder / "vocab_map.safetensors")
    maps["prefix_ids"][3] = 10**9
    save_file(maps, folder / "vocab_map.safetensors")
    record = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    record["manifest"]["prefix_map_sha256"] = _map_fingerprint(maps["prefix_ids"])
    record["sha256"] = fingerprint(record["manifest"])
    (folder / "manifest.json").write_text(json.dumps(record), encoding="utf-8")


def tamper_map(folder: Path) -> None:
    pairs = load_file(folder / "vocab_map.safetensors")
    pairs["teacher_ids"] = pairs["teacher_ids"][::-1].copy()
    save_file(pairs, folder / "vocab_map.safetensors")


DAMAGES = {
    "shared": lambda folder: tamper_manifest(folder, "shared", True),
    "fingerprint": lambda folder: tamper_manifest(folder, "fingerprint", "0" * 64),
    "sample": lambda folder: tamper_manifest(folder, "sample", {"coverage": 1.0}),
    "format": lambda folder: tamper_manifest(folder, "format", "megatron_tide.bridge/0"),
    "map": tamper_map,
    "prefixes": out_of_range,
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "no map": lambda folder: (folder / "vocab_map.safetensors").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"manifest": {', encoding="utf-8"),
    "a list": lambda folder: (folder / "manifest.json").write_text("[]", encoding="utf-8"),
    "half a map": lambda folder: (folder / "vocab_map.safetensors").write_bytes(b"\x08\0\0"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_said_in_a_line(tmp_path: Path, bridge: Bridge, damage: Callable[[Path], object]) -> None:
    bridge.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match="build the bridge again with --fresh") as caught:
        Bridge.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
