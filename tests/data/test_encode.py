"""One conversation -> one sample: whole chunks, both sides consistent, EOS fill, prompts as generation makes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tide.data import PROMPT, UNALIGNED, Sample, TokenizedSample
from megatron_tide.data.encode import (
    EMPTY_RESPONSE,
    MORE_THAN_TEXT,
    NO_ASSISTANT,
    NO_ROOM,
    NOT_WRITTEN,
    REFUSED,
    Dropped,
    Encoded,
    TokenizerSettings,
    chunk_ends,
)
from megatron_tide.data.shard import pack
from megatron_tide.tables import Message
from tests.data.conftest import Pair, conversation, encode

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60) | st.lists(
    st.sampled_from(["return left", "\n    ", "name", "世界", "🏳️‍🌈", "\r\n", "\t", " "]), min_size=1, max_size=40
).map("".join)


def _messages(response: str, prompt: str = "Do it.") -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _content(pair: Pair, side: TokenizedSample, name: str, chunks: int | None = None) -> bytes:
    """The bytes of a side's response tokens, or of those in its first ``chunks`` chunks."""
    tokenizer = getattr(pair, name)
    ids, chunk = side.ids[side.prompt :], side.chunk[side.prompt :]
    return b"".join(tokenizer.token_bytes(ids if chunks is None else ids[(chunk >= 0) & (chunk < chunks)]))


@settings(max_examples=150, deadline=None)
@given(response=TEXT, student_length=st.integers(2, 12), teacher_length=st.integers(2, 12))
def test_truncation_keeps_the_most_whole_chunks_that_fit_both_sides(
    pair: Pair, response: str, student_length: int, teacher_length: int
) -> None:
    encoder = pair.encoder(8 * student_length, 16 * teacher_length)
    encoded = encode(encoder, _messages(response))
    if not response.strip():
        assert encoded == Dropped(EMPTY_RESPONSE)
        return
    aligned = pair.bridge.align_text(response)
    prompts = [len(_prompt(pair, name)) for name in ("student", "teacher")]
    room = [8 * student_length - prompts[0], 16 * teacher_length - prompts[1]]
    whole = [aligned.student_ids, aligned.teacher_ids]
    ends = [chunk_ends(chunk, aligned.n_chunks) for chunk in (aligned.student_chunk, aligned.teacher_chunk)]
    fits = [c for c in range(1, aligned.n_chunks + 1) if all(end[c - 1] <= r for end, r in zip(ends, room))]
    complete = all(len(ids) + 1 <= r for ids, r in zip(whole, room))
    if not complete and not fits:
        assert encoded == Dropped(NO_ROOM)
        return
    assert isinstance(encoded, Encoded)
    sample, teacher = encoded.sample, encoded.sample.teacher
    assert teacher is not None
    assert encoded.truncated is not complete
    assert len(sample.student.ids) <= 8 * student_length
    assert len(teacher.ids) <= 16 * teacher_length
    if complete:
        _check_complete(pair, sample, teacher, response)
    else:
        assert sample.chunks == max(fits)
        for side, ids in zip((sample.student, teacher), whole):
            kept = side.ids[side.prompt :]
            assert np.array_equal(kept, ids[: len(kept)])
            assert side.chunk[-1] == sample.chunks - 1
            assert side.content_end == len(side.ids) - 1
        assert response.encode().startswith(_content(pair, sample.student, "student"))
        assert len(_content(pair, sample.student, "student")) == sample.response_bytes
    _check_both(pair, sample, teacher)


def _prompt(pair: Pair, name: str) -> np.ndarray:
    tokenizer = getattr(pair, name)
    return tokenizer.encode_prompt(tokenizer.render(_messages("")[:1], add_generation_prompt=True))


def _check_both(pair: Pair, sample: Sample, teacher: TokenizedSample) -> None:
    for side in (sample.student, teacher):
        assert (side.chunk[: side.prompt] == PROMPT).all()
        assert (side.chunk[side.prompt :] != PROMPT).all()
        scored = side.chunk[side.prompt : side.content_end + 1]
        covered = scored[scored >= 0]
        assert (np.diff(covered) >= 0).all()
        assert set(covered.tolist()) == set(range(sample.chunks))  # each chunk has tokens on this side
    for chunk in range(sample.chunks):
        spelled = [
            b"".join(
                tokenizer.token_bytes(side.ids[: side.content_end + 1][side.chunk[: side.content_end + 1] == chunk])
            )
            for tokenizer, side in ((pair.student, sample.student), (pair.teacher, teacher))
        ]
        assert spelled[0] == spelled[1]


def _check_complete(pair: Pair, sample: Sample, teacher: TokenizedSample, response: str) -> None:
    assert _content(pair, sample.student, "student") == response.encode()
    assert sample.response_bytes == len(response.encode())
    for side, tokenizer, block in ((sample.student, pair.student, 8), (teacher, pair.teacher, 16)):
        assert len(side.ids) % block == 0
        fill = side.ids[side.content_end :]
        assert 1 <= len(fill) <= block
        assert (fill == tokenizer.eos_id).all()
        assert side.chunk[side.content_end] == sample.chunks - 1
        assert (side.chunk[: side.content_end] != sample.chunks - 1).all()
    assert (sample.student.chunk[sample.student.content_end + 1 :] == UNALIGNED).all()
    assert (teacher.chunk[teacher.content_end + 1 :] == sample.chunks - 1).all()


def test_prompts_are_what_generation_feeds_the_models(pair: Pair) -> None:
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say <|im_end|> twice."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Please."},
    ]
    encoded = encode(pair.encoder(512, 512), [*history, {"role": "assistant", "content": "print(1)"}], key=3)
    assert isinstance(encoded, Encoded)
    assert encoded.sample.key == 3
    for name in ("student", "teacher"):
        tokenizer, side = getattr(pair, name), getattr(encoded.sample, name)
        expected = tokenizer.encode_prompt(tokenizer.render(history, add_generation_prompt=True))
        assert np.array_equal(side.ids[: side.prompt], expected)


def test_special_strings_in_a_response_stay_text(pair: Pair) -> None:
    encoded = encode(pair.encoder(512, 512), _messages("a <|mask|> and <|im_end|> b"))
    assert isinstance(encoded, Encoded)
    side = encoded.sample.student
    content = side.ids[side.prompt : side.content_end].tolist()
    assert not set(content) & set(pair.student.special_ids)


def test_a_response_that_fills_its_blocks_gets_one_block_more_for_its_end(pair: Pair) -> None:
    one = pair.student_only(512)
    lengths = set()
    for words in range(1, 30):
        encoded = encode(one, _messages("x" * words))
        assert isinstance(encoded, Encoded)
        side = encoded.sample.student
        assert 1 <= len(side.ids) - side.content_end <= 8
        lengths.add(len(side.ids) - side.content_end)
    assert lengths >= {1, 8}


@pytest.mark.parametrize("two_sided", [True, False])
def test_a_response_that_leaves_no_place_for_its_end_is_cut(pair: Pair, two_sided: bool) -> None:
    encoder = pair.encoder(64, 512) if two_sided else pair.student_only(64)
    prompt, seen = len(_prompt(pair, "student")), set()
    for count in range(1, 64):
        response = "@" * count
        left = 64 - prompt - len(pair.student.encode(response))
        encoded = encode(encoder, _messages(response))
        assert isinstance(encoded, Encoded)
        assert encoded.truncated == (left < 1)
        assert len(encoded.sample.student.ids) <= 64
        seen.add(left)
    assert {0, 1} <= seen


@settings(max_examples=60, deadline=None)
@given(response=TEXT.filter(str.strip), length=st.integers(2, 12))
def test_one_sided_data_have_no_chunks_and_use_all_the_room(pair: Pair, response: str, length: int) -> None:
    encoded = encode(pair.student_only(8 * length), _messages(response))
    prompt, ids = len(_prompt(pair, "student")), pair.student.encode(response)
    if 8 * length <= prompt:
        assert encoded == Dropped(NO_ROOM)
        return
    assert isinstance(encoded, Encoded)
    side = encoded.sample.student
    assert encoded.sample.teacher is None
    assert encoded.sample.chunks == 0
    assert (side.chunk[prompt:] == UNALIGNED).all()
    kept = min(len(ids), 8 * length - prompt)
    assert np.array_equal(side.ids[prompt : prompt + kept], ids[:kept])
    assert encoded.truncated == (prompt + len(ids) + 1 > 8 * length)
    assert side.content_end == prompt + kept - encoded.truncated


def _plain(row: Encoded | Dropped) -> object:
    """All of a row as values that ``==`` compares."""
    if isinstance(row, Dropped):
        return row
    return pack([row.sample]).to_pydict(), row.truncated, row.covered_bytes, row.total_bytes


@pytest.mark.parametrize("two_sided", [True, False])
def test_how_rows_are_grouped_does_not_matter(pair: Pair, two_sided: bool) -> None:
    encoder = pair.encoder() if two_sided else pair.student_only()
    rows = [(number, conversation(number)) for number in range(40)]
    rows[3:3] = [(100, [{"role": "user", "content": "Hi"}]), (101, _messages("x", "word " * 200))]
    alone = [encode(encoder, messages, key) for key, messages in rows]
    assert {row.reason for row in alone if isinstance(row, Dropped)} == {NO_ASSISTANT, NO_ROOM}
    assert {row.truncated for row in alone if isinstance(row, Encoded)} == {True, False}
    for size in (2, 16, len(rows)):
        grouped = [row for at in range(0, len(rows), size) for row in encoder.encode_rows(rows[at : at + size])]
        assert [_plain(row) for row in grouped] == [_plain(row) for row in alone]
    assert encoder.encode_rows([]) == []


@pytest.mark.parametrize("two_sided", [True, False])
def test_a_refused_row_leaves_its_group_as_it_is(pair: Pair, two_sided: bool) -> None:
    encoder = pair.encoder() if two_sided else pair.student_only()
    rows = [(number, conversation(number)) for number in range(5)]
    refused = {2: _messages("half a pair: \ud800"), 4: _messages("print(1)", "half a pair: \ud800")}
    for place, messages in refused.items():
        rows.insert(place, (100 + place, messages))
    found = encoder.encode_rows(rows)
    for place, ((key, messages), row) in enumerate(zip(rows, found, strict=True)):
        if place in refused:
            assert isinstance(row, Dropped)
            assert row.reason == REFUSED
            assert row.error
            assert "surrogate" in row.error
        else:
            assert isinstance(row, Encoded)
            assert _plain(row) == _plain(encode(encoder, messages, key))


@pytest.mark.parametrize(("length", "block"), [(60, 32), (16, 32), (0, 32), (64, 0)])
def test_lengths_that_are_no_multiple_of_the_block_are_refused(pair: Pair, length: int, block: int) -> None:
    with pytest.raises(ValueError, match=f"length {length} is not a multiple of block {block}"):
        TokenizerSettings(tokenizer=pair.student, length=length, block=block)


def test_what_the_template_or_the_response_leaves_out_is_dropped_and_counted(pair: Pair) -> None:
    encoder = pair.encoder(512, 512)
    calls = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    lost: list[tuple[Message, str]] = [
        ({"role": "assistant", "content": "", "tool_calls": calls}, NOT_WRITTEN),
        ({"role": "assistant", "content": "", "refusal": "No."}, NOT_WRITTEN),
        ({"role": "assistant", "content": "Yes.", "name": "Ann"}, NOT_WRITTEN),
        ({"role": "assistant", "content": "Look.", "images": [1]}, NOT_WRITTEN),
    ]
    for message, reason in lost:
        row = encode(encoder, [message, *_messages("Yes.")])
        assert isinstance(row, Dropped)
        assert row.reason == reason
        assert "leaves out" in str(row.error)
        assert encode(encoder, [*_messages("Yes.")[:1], message]) == Dropped(MORE_THAN_TEXT)


def test_control_tokens_in_a_prompt_come_from_the_template(pair: Pair) -> None:
    plain, typed = (
        encode(pair.encoder(512, 512), _messages("Yes.", prompt)) for prompt in ("x", "<|mask|><|im_end|></s><|mask|>")
    )
    assert isinstance(plain, Encoded)
    assert isinstance(typed, Encoded)
    for name in ("student", "teacher"):
        special = getattr(pair, name).special_ids
        found = [
            [index for index in getattr(row.sample, name).ids.tolist() if index in special] for row in (plain, typed)
        ]
        assert set(found[0]) == set(found[1])
        assert getattr(pair, name).mask_id not in found[1]
