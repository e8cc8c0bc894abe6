"""Answers with holes: the text around them is the user's, whatever a tokenizer does to the ends of a text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_tide.bridge import TextTokenizer, align_text, load_tokenizer
from megatron_tide.generate import AnswerFile, tell_changes, with_holes
from megatron_tide.generate.complete import Completion
from megatron_tide.generate.prompts import HOLE, Prompt
from tests.support.tokenizers import TEXTS, train_byte_bpe

KEPT = (
    "riv<mask:2>r",
    "<mask:1>x",
    "a <mask:1> b",
    "x<mask:1> y <mask:2> z",
    "a<mask:1>",
    "<|mask|> <mask:1> <|mask|>",
)
CHANGED = (
    " <mask:1>",
    "  a  b  <mask:1>  c\n",
    "A\ufb01\t<mask:1>\u00a0\uff21",
    "\r\n<mask:1>\u2581x ",
    "\u4e16<mask:1> ",
)
MODELS: dict[str, dict[str, Any]] = {
    "trims": {},
    "trims, without a prefix": {"add_dummy_prefix": False, "model_type": "bpe"},
    "keeps": {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "keeps, without a prefix": {"remove_extra_whitespaces": False, "add_dummy_prefix": False},
    "space behind": {"treat_whitespace_as_suffix": True},
    "space behind, keeps": {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
    "space behind, in pairs": {"treat_whitespace_as_suffix": True, "model_type": "bpe"},
    "space behind, no end": {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False},
    "lower case": {"normalization_rule_name": "nmt_nfkc_cf"},
    "no bytes": {"byte_fallback": False, "normalization_rule_name": "nfkc"},
    "pieces of the user's": {"user_defined_symbols": ["<|mask|>", "riv", "\u2581\u2581"]},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TextTokenizer]:
    def make(name: str) -> TextTokenizer:
        folder, model = tmp_path_factory.mktemp("model"), io.BytesIO()
        lines = [line for text in TEXTS for line in text.splitlines()]
        options = {"vocab_size": 370, "byte_fallback": True, "user_defined_symbols": ["<|mask|>"], **MODELS[name]}
        options |= {"hard_vocab_limit": False, "minloglevel": 2}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        (folder / "tokenizer_config.json").write_text('{"mask_token": "<|mask|>", "eos_token": "</s>"}')
        return load_tokenizer(folder)

    return make


def filled(prompt: Prompt, tokenizer: TextTokenizer) -> str:
    """The answer with every mask filled by an "a"."""
    fill = next(one for one in range(tokenizer.vocab_size) if tokenizer.id_to_bytes(one) == b"a")
    ids = [fill if one == tokenizer.mask_id else one for one in prompt.ids.tolist()]
    return prompt.answer(tokenizer, Completion([], "", True, 1, ids))


@pytest.mark.parametrize("name", MODELS)
def test_the_text_around_a_hole_is_the_users(made: Callable[[str], TextTokenizer], name: str) -> None:
    tokenizer = made(name)
    for answer in (*KEPT, *CHANGED):
        prompt = with_holes(tokenizer, Prompt(np.array([], np.int32), ""), answer)
        assert filled(prompt, tokenizer) == HOLE.sub(lambda found: "a" * int(found[1]), answer)
        ids = prompt.ids.tolist()
        spelled = tokenizer.decode(ids, skip_special=False)  # what the model sees
        if answer in KEPT and "<unk>" not in spelled:
            assert spelled == HOLE.sub(lambda found: "<|mask|>" * int(found[1]), answer)
        assert len(prompt.parts) == len(list(filter(None, HOLE.split(answer))))


@pytest.mark.parametrize(
    ("name", "word"), [("keeps", ""), ("lower case", "'Two ' is read as 'two '"), ("trims", "' y' is read as 'y'")]
)
def test_text_that_a_tokenizer_changes_is_told(
    made: Callable[[str], TextTokenizer], capsys: pytest.CaptureFixture[str], name: str, word: str
) -> None:
    tokenizer, texts = made(name), ["a <mask:1> x", "add Two <mask:1> x  y", "a  b<mask:1>"]
    prompts = [with_holes(tokenizer, Prompt(np.array([], np.int32), ""), text) for text in texts]
    assert [bool(prompt.changed) for prompt in prompts] == [False, bool(word), bool(word)]
    tell_changes(prompts)
    told = capsys.readouterr().err
    assert ("2 of 3 prompts before the model reads it" in told) == bool(word)
    assert word in told


@pytest.mark.parametrize("name", [name for name in MODELS if "behind" in name])
@pytest.mark.parametrize("text", ["hello world, it is", "a ", "x", "names: one.", "<|mask|> x <|mask|>"])
def test_a_space_that_a_tokenizer_writes_behind_a_text_is_none_of_it(
    tmp_path: Path, made: Callable[[str], TextTokenizer], name: str, text: str
) -> None:
    student, teacher = made(name), load_tokenizer(train_byte_bpe(tmp_path / "bytes", TEXTS, 300))
    ids = student.encode(text)
    assert student.decode(ids).rstrip(" ") == text.rstrip(" ")
    assert student.encode_with_bytes(text).data.rstrip(b" ") == text.rstrip(" ").encode()
    assert student.byte_lengths(ids).sum() == len(b"".join(student.token_bytes(ids)))
    for pair in ((student, teacher), (teacher, student)):
        aligned = align_text(*pair, text)
        assert aligned.covered_bytes >= len(text.rstrip(" "))


def test_equal_prompts_keep_their_own_references_and_texts(
    tmp_path: Path, made: Callable[[str], TextTokenizer]
) -> None:
    tokenizer, file = made("lower case"), tmp_path / "answers.jsonl"
    ids = tokenizer.encode("name")

    def rows(references: Sequence[str], answers: bool) -> list[Any]:
        prompts = [Prompt(ids, f"name {one}", one) for one in references]
        answer_file = AnswerFile(file, tokenizer, prompts, [0] * len(prompts), "model")
        assert bool(answer_file.missing) == answers
        answer_file.add({place: Completion([], "x", True, 1, ids.tolist()) for place in answer_file.missing})
        answer_file.close()
        found = [json.loads(line) for line in file.read_text().splitlines()]
        return [(row["prompt"], row["reference"]) for row in found]

    assert rows(["one", "two"], True) == [("name one", "one"), ("name two", "two")]
    assert rows(["one", "three"], False) == [("name one", "one"), ("name three", "three")]
    holes = [with_holes(tokenizer, Prompt(ids, ""), text) for text in ("A<mask:1>", "a<mask:1>")]
    assert holes[0].ids.tolist() == holes[1].ids.tolist()
    file.write_text("my only copy\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl: not a file of answers; use another one"):
        rows(["one"], True)
    assert file.read_text() == "my only copy\n"
    both = AnswerFile(tmp_path / "holes.jsonl", tokenizer, holes, [0, 0], "model")
    both.add({place: Completion([], "", True, 1, holes[place].ids.tolist()) for place in (0, 1)})
    assert [row["answer"] for row in both.close()] == ["A", "a"]
