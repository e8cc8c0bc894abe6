"""TextTokenizer: bytes per token, special tokens, templates, fingerprints, and what cannot be loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from tests.bridge.texts import HARD_TEXTS
from tests.support.tokenizers import TEXTS, train_byte_bpe, train_sentencepiece

KINDS = ("student", "teacher", "prefixed")
CONVERSATION = [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "x + y"}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD_TEXTS.values(), ids=HARD_TEXTS)
def test_tokens_spell_the_text(tokenizers: Mapping[str, TextTokenizer], kind: str, text: str) -> None:
    assert_spells(tokenizers[kind], text)


@given(text=st.text(max_size=60))
@settings(max_examples=200)
def test_tokens_spell_any_text(tokenizers: Mapping[str, TextTokenizer], text: str) -> None:
    for kind in KINDS:
        # SentencePiece writes its space mark for a space and cannot tell it from the same character in the text.
        assert_spells(tokenizers[kind], text.replace("\u2581", " "))


def assert_spells(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    data = text.encode("utf-8")
    assert ids.dtype == np.int32
    assert b"".join(tokenizer.token_bytes(ids)) == data
    assert tokenizer.byte_lengths(ids).tolist() == [len(piece) for piece in tokenizer.token_bytes(ids)]
    assert not set(ids.tolist()) & tokenizer.special_ids
    assert tokenizer.decode(ids) == text
    spelling = tokenizer.encode_with_bytes(text)
    assert spelling.data == data
    assert spelling.lengths.sum() == len(data)
    assert spelling.ids.tolist() == ids.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_special_strings_are_special_in_prompts_only(tokenizers: Mapping[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    for token in tokenizer.special_ids:
        string = tokenizer.id_to_token(token)
        assert string
        if string == "<unk>":
            continue
        text = f"before {string} after{string}"
        assert_spells(tokenizer, text)
        assert tokenizer.encode_prompt(text).tolist().count(token) == 2
        assert tokenizer.id_to_bytes(token) is None


@pytest.mark.parametrize("kind", KINDS)
def test_roles(tokenizers: Mapping[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    strings = {"student": ("<|im_end|>", "<|endoftext|>")}.get(kind, ("<|endoftext|>", "<|endoftext|>"))
    assert (tokenizer.id_to_token(tokenizer.eos_id), tokenizer.id_to_token(tokenizer.pad_id)) == strings
    assert tokenizer.id_to_token(tokenizer.mask_id) == "<|mask|>"
    assert {tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id} <= tokenizer.special_ids


def test_templates_differ_and_prompts_become_special_tokens(tokenizers: Mapping[str, TextTokenizer]) -> None:
    student, teacher = tokenizers["student"], tokenizers["teacher"]
    assert student.render(CONVERSATION[:1]) == "<|im_start|>user\nAdd.<|im_end|>\n<|im_start|>assistant\n"
    assert teacher.render(CONVERSATION[:1]) == "<role>HUMAN</role>Add.<|role_end|><role>ASSISTANT</role>"
    assert teacher.render(CONVERSATION, False).endswith("<role>ASSISTANT</role>x + y<|role_end|>")
    for tokenizer, specials in ((student, 3), (teacher, 5)):
        rendered = tokenizer.render(CONVERSATION[:1])
        ids = tokenizer.encode_prompt(rendered)
        assert sum(token in tokenizer.special_ids for token in ids.tolist()) == specials
        assert tokenizer.decode(ids, skip_special=False) == rendered
    with pytest.raises(ValueError, match="rejects the conversation"):
        teacher.render([{"role": "user"}, "no message"])  # type: ignore[list-item]


def test_hugging_face_agrees_on_ids_and_template(folders: Mapping[str, Path]) -> None:
    ours, theirs = load_tokenizer(folders["student"]), AutoTokenizer.from_pretrained(folders["student"])
    for text in HARD_TEXTS.values():
        assert ours.encode_prompt(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    rendered = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert ours.render(CONVERSATION) == rendered


def test_a_truncating_wrapper_does_not_reach_our_copy(folders: Mapping[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["student"])
    before = tokenizer.encode(TEXTS[0]).tolist()
    tokenizer.raw(TEXTS[0], truncation=True, max_length=3)
    assert tokenizer.encode(TEXTS[0]).tolist() == tokenizer.encode_prompt(TEXTS[0]).tolist() == before


def metaspace_folder(folder: Path, scheme: str) -> Path:
    """A Llama-like tokenizer.json: SentencePiece-style BPE with byte fallback in Hugging Face form."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for piece in ["\u2581", "a", "b", "c", "ab", "\u2581a", "\u2581ab"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("a", "b"), ("\u2581", "a"), ("\u2581", "ab")]
    tokenizer = hf.Tokenizer(hf.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    decode = [hf.decoders.Replace("\u2581", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    tokenizer.decoder = hf.decoders.Sequence(decode)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("text", ["ab c", " ab", "  ab", "é ab\n", "", " ", "</s>ab"])
def test_metaspace_prefix_is_taken_off(tmp_path: Path, scheme: str, text: str) -> None:
    tokenizer = load_tokenizer(metaspace_folder(tmp_path, scheme))
    spelling = tokenizer.encode_with_bytes(text)
    assert spelling.data == text.encode("utf-8")
    assert int(spelling.lengths.sum()) == len(spelling.data)


def test_unigram_never_makes_a_special_piece_from_text(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", -0.1), ("<", -3.0), ("/", -3.0), ("s", -3.0), (">", -3.0), ("x", -3.0)]
    tokenizer = hf.Tokenizer(hf.models.Unigram([*pieces, ("\u2581", -2.0)], unk_id=0))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    tokenizer.decoder = hf.decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.decode(loaded.encode("x</s>x")) == "x</s>x"
    assert loaded.eos_id not in loaded.encode("x</s>x")
    assert loaded.eos_id in loaded.encode_prompt("x</s>x")


def test_fingerprint_follows_what_decides_ids(tmp_path: Path, tokenizers: Mapping[str, TextTokenizer]) -> None:
    student = tokenizers["student"]
    again = load_tokenizer(train_byte_bpe(tmp_path / "again", TEXTS, 400))
    assert again.fingerprint == student.fingerprint
    shutil.copytree(tmp_path / "again", tmp_path / "reworded")
    (tmp_path / "reworded" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    reworded = load_tokenizer(tmp_path / "reworded")
    assert reworded.fingerprint == student.fingerprint
    assert reworded.template_fingerprint != student.template_fingerprint
    shutil.copytree(tmp_path / "again", tmp_path / "renamed")
    (tmp_path / "renamed" / "chat_template.jinja").write_text("{{ eos_token }}", encoding="utf-8")
    before = load_tokenizer(tmp_path / "renamed").template_fingerprint
    config = tmp_path / "renamed" / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(settings | {"eos_token": settings["mask_token"]}), encoding="utf-8")
    assert load_tokenizer(tmp_path / "renamed").template_fingerprint != before
    other_mask = load_tokenizer(train_byte_bpe(tmp_path / "mask", TEXTS, 400, mask="<|hole|>"))
    smaller = load_tokenizer(train_byte_bpe(tmp_path / "smaller", TEXTS, 399))
    pieces = load_tokenizer(train_sentencepiece(tmp_path / "pieces", TEXTS[:20], 420))
    prints = {student.fingerprint, other_mask.fingerprint, smaller.fingerprint, pieces.fingerprint}
    prints |= {tokenizers["teacher"].fingerprint, tokenizers["prefixed"].fingerprint}
    assert len(prints) == 6


@pytest.mark.parametrize("word", ["{{ strftime_now('%d %b %Y') }}", "{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_a_template_that_writes_the_date_is_refused(tmp_path: Path, folders: Mapping[str, Path], word: str) -> None:
    """Equal settings must give equal prompts, tomorrow too."""
    shutil.copytree(folders["student"], tmp_path / "dated")
    (tmp_path / "dated" / "chat_template.jinja").write_text(word + "{{ messages[0]['content'] }}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"today's date or a random choice.*put a chat_template\.jinja") as refused:
        load_tokenizer(tmp_path / "dated").render([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_pickled_copies_are_the_same(
    tmp_path: Path, tokenizers: Mapping[str, TextTokenizer], kind: str
) -> None:
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path / "copy")
    for copy in (load_tokenizer(tmp_path / "copy"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.template_fingerprint == tokenizer.template_fingerprint
        assert copy.mask_id == tokenizer.mask_id


def test_added_tokens_on_top_of_a_sentencepiece_model(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    shutil.copytree(folders["teacher"], tmp_path / "tok")
    base = load_tokenizer(tmp_path / "tok")
    config = json.loads((tmp_path / "tok" / "tokenizer_config.json").read_text(encoding="utf-8"))
    top = base.vocab_size + 2
    config |= {"added_tokens_decoder": {str(top): {"content": "<|tool|>"}}, "mask_token": {"content": "<|tool|>"}}
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (top + 1, top)
    assert tokenizer.encode_prompt("a<|tool|>b").tolist().count(top) == 1
    assert_spells(tokenizer, "a<|tool|>b")
    assert tokenizer.id_to_bytes(top - 1) is None
    assert tokenizer.fingerprint != base.fingerprint


def test_bare_sentencepiece_model_has_its_own_roles(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    shutil.copy(folders["teacher"] / "tokenizer.model", tmp_path / "bare.model")
    tokenizer = load_tokenizer(tmp_path / "bare.model")
    assert tokenizer.id_to_token(tokenizer.eos_id) == "<|endoftext|>"
    assert tokenizer.id_to_token(tokenizer.mask_id) == "<|mask|>"
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render(CONVERSATION)


def test_mask_token_is_named_or_missed(tmp_path: Path, folders: Mapping[str, Path]) -> None:
    named = load_tokenizer(folders["student"], mask_token="<|im_start|>")
    assert named.id_to_token(named.mask_id) == "<|im_start|>"
    with pytest.raises(ValueError, match=r"no token '<\|hole\|>' to use as the mask"):
        load_tokenizer(folders["student"], mask_token="<|hole|>")
    unmasked = load_tokenizer(metaspace_folder(tmp_path, "never"))
    assert unmasked.describe()["mask_id"] is None
    with pytest.raises(ValueError, match="has no mask token"):
        _ = unmasked.mask_id


def test_a_mask_by_its_id_is_no_token_of_the_same_digits(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path, [*TEXTS, *["0 1 2 3 4 5 6 7 8 9"] * 8], 400)
    tokenizer = load_tokenizer(tmp_path, mask_token="3")
    assert tokenizer.mask_id == 3
    assert tokenizer.decode(tokenizer.encode("1 3 3")) == "1 3 3"


def test_half_a_surrogate_pair_is_refused(tokenizers: Mapping[str, TextTokenizer]) -> None:
    for kind in KINDS:
        with pytest.raises(ValueError, match="surrogate pair at character 1"):
            tokenizers[kind].encode("a\ud800")


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "noise.model").write_bytes(b"no model at all")
    word_piece = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    word_piece.decoder = hf.decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=word_piece).save_pretrained(tmp_path / "words")
    for path, reason in [
        ("absent/tokenizer", "no such tokenizer"),
        ("empty", "no tokenizer.json"),
        ("broken", "broken"),
        ("noise.model", "cannot read the tokenizer"),
        ("words", "WordPiece"),
    ]:
        with pytest.raises(ValueError, match=reason):
            load_tokenizer(tmp_path / path)


@pytest.mark.parametrize("name", ["end_of_word_suffix", "continuing_subword_prefix"])
def test_marks_of_parts_of_words_are_refused(tmp_path: Path, folders: Mapping[str, Path], name: str) -> None:
    """They would be bytes of the text. With the second, the library panics, which is no Exception in Python."""
    shutil.copytree(folders["student"], tmp_path / "marks")
    file = tmp_path / "marks" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"][name] = "</w>"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot read the tokenizer") as caught:
        load_tokenizer(tmp_path / "marks")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "inclusionAI/LLaDA2.0-mini", "gpt2"])
def test_hub_names_are_downloaded(monkeypatch: pytest.MonkeyPatch, folders: Mapping[str, Path], name: str) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(repo: str, allow_patterns: list[str]) -> str:
        asked.append((repo, allow_patterns))
        return str(folders["teacher"])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    tokenizer = load_tokenizer(name)
    assert (tokenizer.name, tokenizer.path) == (name, folders["teacher"])
    assert asked[0][0] == name
    assert "*.py" not in asked[0][1]
    load_tokenizer(name, trust_remote_code=True)
    assert "*.py" in asked[1][1]


@pytest.mark.parametrize("name", ["./Qwen3", "runs/a/b", "~/tok", "models/tokenizer.model", "qwen/x.tiktoken"])
def test_paths_are_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="no such tokenizer folder or file"):
        load_tokenizer(name)


def test_no_message_is_longer_than_a_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word", "normalized"])
def test_how_an_added_token_takes_its_surroundings_is_part_of_the_fingerprint(
    tmp_path: Path, folders: Mapping[str, Path], flag: str
) -> None:
    found = []
    for value in (False, True):
        folder = shutil.copytree(folders["student"], tmp_path / str(value))
        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        (token,) = [one for one in spec["added_tokens"] if one["content"] == "<|mask|>"]
        token[flag] = value
        (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        found.append(load_tokenizer(folder).fingerprint)
    assert found[0] != found[1]
    assert found[0] == load_tokenizer(folders["student"]).fingerprint


def test_a_decoder_that_decides_the_bytes_is_in_the_fingerprint(tmp_path: Path) -> None:
    folder = train_byte_bpe(tmp_path / "bpe", TEXTS, 320)
    file = folder / "tokenizer.json"
    spec = json.loads(file.read_text())
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never"}
    found = set()
    for decoder in (spec["decoder"], spec["pre_tokenizer"]):
        file.write_text(json.dumps({**spec, "decoder": decoder}))
        found.add(load_tokenizer(folder).fingerprint)
    assert len(found) == 2
