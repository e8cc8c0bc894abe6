"""Prompts from people, files and prepared data, and completions as text."""

from __future__ import annotations

import io
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.data import PreparedData
from megatron_tide.errors import Ended
from megatron_tide.generate import chat, complete, from_prepared, from_text, read_prompts, stream, with_holes
from megatron_tide.generate.complete import Completion, Moment
from megatron_tide.generate.prompts import Prompt, from_messages, print_answer
from megatron_tide.generate.terminal import MASKED, LiveText
from megatron_tide.models import load_model
from megatron_tide.screen import LAYOUT, printable
from tests.support.lab import Lab, response


@pytest.fixture(scope="module")
def model(lab: Lab) -> Any:
    return load_model(lab.student)


@pytest.fixture(scope="module")
def tokenizer(lab: Lab) -> TextTokenizer:
    return load_tokenizer(lab.student)


def test_answers_are_the_models_own_in_order(model: Any, tokenizer: TextTokenizer) -> None:
    """Whatever was batched with what, and although prompts of like length go together."""
    prompts = [from_text(tokenizer, text).ids for text in ("a long question " * 6, "hi", "what is it, and why?", "no")]
    answers = complete(model, tokenizer, prompts, batch_size=2, max_new_tokens=11)
    for prompt, answer in zip(prompts, answers):
        expected = model.generate(torch.tensor([prompt.tolist()]), max_new_tokens=11)[0, len(prompt) :].tolist()
        assert answer.ids == expected
        assert answer.text == tokenizer.decode(expected)
        assert answer.finished == (expected[-1] == tokenizer.eos_id)
    drawn = [
        complete(model, tokenizer, prompts, batch_size=size, max_new_tokens=5, temperature=1.0, seed=3)
        for size in (1, 4)
    ]
    assert [answer.ids for answer in drawn[0]] == [answer.ids for answer in drawn[1]]


def test_a_token_that_the_model_does_not_have_is_one_line(lab: Lab, tokenizer: TextTokenizer) -> None:
    small, prompt = load_model(lab.student), from_text(tokenizer, "hi").ids
    for call in (complete, lambda *args: list(stream(args[0], args[1], args[2][0]))):
        with pytest.raises(ValueError, match=r"prompt 0 has token 99999, the model \d+ tokens; use its own"):
            call(small, tokenizer, [np.array([3, 99999])])
    small.config.vocab_size = int(max(prompt)) + 1
    with pytest.raises(ValueError, match="the tokenizer has token"):
        complete(small, tokenizer, [prompt])


def test_another_mask_than_the_models_is_one_line(lab: Lab) -> None:
    other = load_tokenizer(lab.student, mask_token="<|endoftext|>")
    with pytest.raises(ValueError, match=r"config\.json has mask_token_id 319, its tokenizer's mask is 316; name that"):
        complete(load_model(lab.student), other, [[1, 2]], max_new_tokens=2)


def test_the_teacher_answers_too(lab: Lab) -> None:
    teacher, tokenizer = load_model(lab.teacher), load_tokenizer(lab.teacher)
    prompts = [from_text(tokenizer, text).ids for text in ("hi", "a longer question, and why?")]
    together = complete(teacher, tokenizer, prompts, max_new_tokens=7)
    assert [answer.ids for answer in together] == [
        complete(teacher, tokenizer, [prompt], max_new_tokens=7)[0].ids for prompt in prompts
    ]


@pytest.mark.parametrize("seed", range(4))
def test_a_stream_tells_the_same_text(model: Any, tokenizer: TextTokenizer, seed: int) -> None:
    prompt = from_text(tokenizer, "what is it?").ids
    options: dict[str, Any] = {"max_new_tokens": 21, "temperature": 1.5, "seed": seed}
    moments = list(stream(model, tokenizer, prompt, **options))
    [answer] = complete(model, tokenizer, [prompt], **options)
    assert "".join(moment.new_text for moment in moments) == answer.text
    assert moments[-1].ids[: len(answer.ids)] == answer.ids
    assert [sum(moment.decided) for moment in moments[:3]] == [1, 2, 3]
    for moment in moments:
        undecided = {token for token, decided in zip(moment.ids, moment.decided) if not decided}
        assert undecided <= {tokenizer.mask_id}


def test_holes_of_an_answer_are_filled_in(model: Any, tokenizer: TextTokenizer) -> None:
    prompt = with_holes(tokenizer, from_text(tokenizer, "hi"), "def f(<mask:3>):\n    return <mask:2>")
    assert (prompt.ids == tokenizer.mask_id).sum() == 5
    [answer] = complete(model, tokenizer, [prompt.ids], max_new_tokens=0)
    assert (answer.ids, tokenizer.mask_id in answer.prompt) == ([], False)
    expected = model.generate(torch.tensor([prompt.ids.tolist()]), max_new_tokens=0)[0].tolist()
    assert answer.prompt == expected
    text = prompt.answer(tokenizer, answer)
    assert text.startswith("def f(")
    assert "):\n    return " in text
    for wrong in ("no hole", "<mask:0>", "<mask:x>", "<mask:99999999999>", "<mask:²>", "<mask:1000000>" * 2):
        with pytest.raises(ValueError, match="mask:N"):
            with_holes(tokenizer, prompt, wrong)


class Screen(io.StringIO):
    """A terminal that remembers what was written."""

    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_chat_remembers_and_shows_masks(model: Any, tokenizer: TextTokenizer, is_terminal: bool) -> None:
    lines, screen = iter(["hello", "", "and?", "/new", "hello", "/exit"]), Screen(is_terminal)
    options: dict[str, Any] = {"max_new_tokens": 18, "tokens_per_step": 2}
    tokens, seconds = chat(stream, model, tokenizer, ask=lambda _: next(lines), out=screen, **options)
    first = complete(model, tokenizer, [from_text(tokenizer, "hello").ids], **options)[0]
    turns = [("user", "hello"), ("assistant", first.text), ("user", "and?")]
    talk = from_messages(tokenizer, [{"role": role, "content": content} for role, content in turns])
    second = complete(model, tokenizer, [talk.ids], **options)[0]
    assert tokens == 2 * len(first.ids) + len(second.ids)
    assert seconds > 0
    assert (MASKED in screen.getvalue()) == is_terminal
    if not is_terminal:
        body = screen.getvalue().split("\n", 1)[1]
        assert body == printable(f"{first.text}\n{second.text}\n{first.text}\n", LAYOUT)


@pytest.mark.parametrize("asked", [KeyboardInterrupt(), Ended(signal.SIGTERM)])
def test_ctrl_c_ends_an_answer_and_a_signal_the_chat(
    model: Any, tokenizer: TextTokenizer, asked: BaseException
) -> None:
    def interrupted(*_: Any, **options: Any) -> Iterator[Moment]:
        yield Moment([65], [True], "A")
        raise asked

    lines = iter(["hello", "/exit"])
    with pytest.raises(Ended) if isinstance(asked, Ended) else nullcontext():
        assert chat(interrupted, model, tokenizer, ask=lambda _: next(lines), out=Screen(False))[0] == 1
    assert [*lines] == (["/exit"] if isinstance(asked, Ended) else [])


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_never_acts_on_generated_text(
    model: Any, tokenizer: TextTokenizer, is_terminal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "def f():\n\treturn 1\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b1m\r\u202e"
    shown = "def f():\n\treturn 1\\x1b]52;c;ZXZpbA==\\x07\\x1b[2J\\x9b1m\\r\\u202e"
    screen, ids = Screen(is_terminal), tokenizer.encode(hostile).tolist()
    live = LiveText(tokenizer, screen)
    live.show(Moment([*ids, 0], [True] * len(ids) + [False], hostile))
    live.close()
    said = screen.getvalue().replace("\r\033[K", "")
    assert said.startswith(shown)
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(said)
    prompt = Prompt(np.array(ids), hostile, hostile)
    print_answer(tokenizer, prompt, Completion(ids, hostile, True, 1, ids), "prompt 1 of 1", True)
    printed = capsys.readouterr().out
    assert printed.count(shown) >= 2
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(printed)


def test_a_chat_ends_with_its_input(model: Any, tokenizer: TextTokenizer) -> None:
    def ask(_: str) -> str:
        raise EOFError

    assert chat(stream, model, tokenizer, ask=ask, out=io.StringIO()) == (0, 0.0)


def test_what_a_chat_takes_as_a_message(model: Any, tokenizer: TextTokenizer) -> None:
    lines = iter(["/help", "/what", '"""', "a", "", "b", '"""', "", "c", "/exit"])
    asked, screen = [], io.StringIO()

    def listen(_model: Any, _tokenizer: TextTokenizer, prompt: Any, **options: Any) -> Iterator[Moment]:
        asked.append(tokenizer.decode(prompt))
        if len(asked) == 1:
            raise KeyboardInterrupt
        yield Moment([5], [True], "yes")

    assert chat(listen, model, tokenizer, ask=lambda _: next(lines), out=screen)[0] == 1
    assert len(asked) == 2
    assert "a\n\nb" in asked[0]
    assert "a\n\nb" in asked[1]
    assert "pasted list" in screen.getvalue()
    assert "/what: no such command" in screen.getvalue()


def test_a_prompt_with_a_picture_is_left_out(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "What?", "images": [{"path": "a.png"}]}, *({"prompt": f"line {n}"} for n in range(200))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt.shown for prompt in read_prompts(file, tokenizer)][:2] == ["line 0", "line 1"]


def test_a_message_that_cannot_be_sent_ends_no_chat(model: Any, tokenizer: TextTokenizer) -> None:
    lines, asked, screen = iter(["a", "half \ud800", "b", "/exit"]), [], io.StringIO()

    def listen(_model: Any, _tokenizer: TextTokenizer, prompt: Any, **options: Any) -> Iterator[Moment]:
        asked.append(tokenizer.decode(prompt))
        yield Moment([5], [True], "yes")

    assert chat(listen, model, tokenizer, ask=lambda _: next(lines), out=screen)[0] == 2
    assert "half a surrogate pair" in screen.getvalue()
    assert "not sent" in screen.getvalue()
    assert "half" not in asked[1]
    assert "a" in asked[1]
    with pytest.raises(ValueError, match="half a surrogate pair"):
        chat(listen, model, tokenizer, ask=lambda _: "\ud800", out=screen)


def test_prompts_of_prepared_data_are_those_of_inference(lab: Lab, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    data = PreparedData.open(lab.data)
    for prompt in from_prepared(data, tokenizer, limit=5):
        number = int(prompt.reference.split()[0].removeprefix("value_"))
        assert prompt.ids.tolist() == from_text(tokenizer, f"Print line {number}.").ids.tolist()
        assert response(number).startswith(prompt.reference)
    with pytest.raises(ValueError, match="another tokenizer"):
        from_prepared(data, load_tokenizer(lab.teacher))
    shutil.copytree(lab.student, tmp_path / "reworded")
    (tmp_path / "reworded" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="prompts rendered with student chat template"):
        from_prepared(data, load_tokenizer(tmp_path / "reworded"))


def test_jsonl(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    file = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    file.write_text('{"prompt": "one"}\n\n' + json.dumps({"messages": turns}) + "\n")
    plain, turned = read_prompts(file, tokenizer)
    assert plain.ids.tolist() == turned.ids.tolist()
    assert (plain.reference, turned.reference) == (None, "two")
    assert len(read_prompts(file, tokenizer, limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ('{"prompt": "x"}\n{oops\n', ":2: not valid JSON"),
        ('{"text": "x"}\n', ":1: needs"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', ":1: a conversation needs"),
        ('{"messages": "x"}\n', ":1: messages must be"),
        (
            '{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}\n',
            ":1: messages beside prompt would be left",
        ),
        ('{"prompt": "x", "system": "y"}\n', ":1: system would be left out; put all of it in messages"),
        ("\n", "holds no prompt"),
        (b"\xff\xfe", "UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, tokenizer: TextTokenizer, content: str | bytes, word: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=word) as caught:
        read_prompts(file, tokenizer)
    assert str(file) in str(caught.value)


def test_what_cannot_be_answered_is_said(lab: Lab, model: Any, tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        complete(model, tokenizer, [[1, 2], []])
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        next(stream(model, tokenizer, []))
    with pytest.raises(ValueError, match="block decoding has no num_beams"):
        complete(model, tokenizer, [[1, 2]], num_beams=3)
    with pytest.raises(ValueError, match="message before the answer"):
        from_messages(tokenizer, [{"role": "assistant", "content": "x"}])
