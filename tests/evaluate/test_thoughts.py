"""Thoughts of models: where they are asked for, and what ends behind them only."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.bridge.chat import Rendered
from megatron_tide.bridge.template import MARKS_OF_THOUGHTS
from megatron_tide.evaluate.benchmark_presets import BenchmarkPreset
from megatron_tide.evaluate.generators import (
    Generator,
    open_generator,
)
from megatron_tide.evaluate.response_cache import ResponseCache
from megatron_tide.evaluate.thoughts import STILL_THINKING, closed, cut, opened_by, text_of, without_thoughts
from tests.evaluate.generating import PRESET, TURN, answers, opened
from tests.support.lab import Lab


def test_cut() -> None:
    assert cut("one two three", ["three", " two"]) == "one"
    assert cut("one", ["", "two"]) == "one"


def test_stop_strings_in_thoughts_end_nothing() -> None:
    thought = "<think>\nQ: is it 4?\n\nNo.</think>\n\n5.\n\nQ: next"
    assert cut(thought, ["\n\n", "Q:"]) == "5."
    assert cut("still opened by the prompt\n\n</think>  x = 1\n\n", ["\n\n"]) == "  x = 1"
    assert cut("<think>\nwithout an end. The answer is 7.", []) == ""


@pytest.mark.parametrize(("start", "end"), MARKS_OF_THOUGHTS.items(), ids=str)
def test_every_mark_of_thoughts(start: str, end: str) -> None:
    thought = f"{start}\nQ: is it 4?\n\nNo.{end}\n\n5.\n\nQ: next"
    assert cut(thought, ["\n\n", "Q:"]) == "5."
    assert cut(f"It is 4, no.{end}\n\n5.", [], f"[assistant] {start}\n") == "5."
    for text, prompt in ((f"{start} still", ""), ("still", f"[assistant] {start}\n")):
        assert without_thoughts(text, prompt).notes == (STILL_THINKING,)
    assert closed(Rendered(f"[assistant] {start}\n", [])).endswith(f"{start}\n\n{end}\n\n")
    assert opened_by(f"what does {start} mean?") == ""


def test_marks_of_other_models_in_an_answer_are_text() -> None:
    for end in set(MARKS_OF_THOUGHTS.values()) - {"</think>"}:
        assert cut(f"Write {end} at the end.", []) == f"Write {end} at the end."


def test_models_think_where_they_are_told_to(
    lab: Lab, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Baselines do not think unless asked to; a student is prompted as it was trained."""
    for kind, start in (("ar", baseline), ("student", lab.student)):
        folder = shutil.copytree(start, tmp_path / kind)
        (folder / "chat_template.jinja").write_text(TURN)
        for thinking, expected in ((None, kind == "ar"), (False, True), (True, False)):
            generator = open_generator(str(folder), torch.float32, "cpu", 1, thinking)
            prompt = generator.apply_chat_template([{"role": "user", "content": "x"}])
            assert prompt == "[user] x\n[assistant] " + "<think>\n\n</think>\n\n" * expected
    assert "--thinking changes nothing" not in capsys.readouterr().err
    open_generator(str(lab.student), torch.float32, "cpu", 1, True)
    assert "--thinking changes nothing" in capsys.readouterr().err


class Writes(torch.nn.Module):
    """In place of a model: each row's next token is that of ``ids`` that follows those written already."""

    def __init__(self, ids: list[int], vocabulary: int) -> None:
        super().__init__()
        self.ids, self.vocabulary, self.passes = ids, vocabulary, 0

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        next_one = self.ids[min(self.passes, len(self.ids) - 1)]
        self.passes += 1
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[..., next_one] = 1.0
        return CausalLMOutputWithPast(logits=logits)


def writes(generator: Generator, text: str, monkeypatch: pytest.MonkeyPatch) -> Writes:
    """Make an autoregressive generator write ``text``, whatever it is asked."""
    ids = [*generator.text_tokenizer.encode(text).tolist(), generator.text_tokenizer.eos_id]
    says = Writes(ids, generator.model.config.vocab_size)
    monkeypatch.setattr(generator.model, "forward", says.__call__)
    return says


LONG = BenchmarkPreset(task="t", new_tokens=100, steps=100, chat_template=True)
OPENED = TURN.replace("<think>\n\n</think>\n\n", "<think>\n")
THINKS = [
    ("<think> STOP </think>\n\n42 STOP no", "42", "x STOP</think>7 STOP", "7"),
    ("<think> STOP", "", "still thinking STOP", ""),
    ("<think>a</think><think> STOP and", "", "a</think>\n<think> STOP", ""),
    ("<think></think>4 <think> STOP", "4 <think>", "</think>4 STOP", "4"),
]


@pytest.mark.parametrize(("closed", "expected", "opened_by_prompt", "expected_then"), THINKS)
def test_a_baseline_stops_behind_its_thoughts_only(
    baseline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed: str,
    expected: str,
    opened_by_prompt: str,
    expected_then: str,
) -> None:
    for name, template, text, answer in (
        ("closed", TURN, closed, expected),
        ("opened", OPENED, opened_by_prompt, expected_then),
    ):
        folder = shutil.copytree(baseline, tmp_path / name)
        (folder / "chat_template.jinja").write_text(template)
        generator = opened(folder, 1)
        prompt = generator.apply_chat_template([{"role": "user", "content": "x <think>"}])
        assert bool(opened_by(prompt)) == (name == "opened")
        says = writes(generator, text, monkeypatch)
        (found,) = answers(generator, [prompt], LONG, until=[" STOP"])
        assert found == answer
        assert getattr(found, "notes", ()) == (() if answer else (STILL_THINKING,))
        assert (says.passes < len(says.ids)) == (answer != "")  # it ended at the stop string


def test_an_unfinished_thought_of_a_block_model_is_no_answer_either(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(lab.student, tmp_path / "student")
    (folder / "chat_template.jinja").write_text(OPENED)
    generator = open_generator(str(folder), torch.float32, "cpu", 2, thinking=False)
    prompt = generator.apply_chat_template([{"role": "user", "content": "x"}])
    plain = open_generator(str(lab.student), torch.float32, "cpu", 2).apply_chat_template(
        [{"role": "user", "content": "x"}]
    )
    for asked, empty in ((prompt, True), (plain, False)):
        (found,) = answers(generator, [asked], replace(PRESET, chat_template=True))
        assert (found == "") == empty
        assert getattr(found, "notes", ()) == ((STILL_THINKING,) if empty else ())
    with ResponseCache(generator, tmp_path / "c.sqlite") as cache:
        for _ in range(2):  # kept answers keep their notes
            assert [one.notes for one in answers(cache, [prompt], replace(PRESET, chat_template=True))] == [
                (STILL_THINKING,)
            ]
    begun = generator.apply_chat_template(
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "def f"}], add_generation_prompt=False
    )
    assert begun.endswith("[assistant] <think>\n\n</think>\n\ndef f")


def test_marks_of_thoughts_count_where_they_are_special_tokens(lab: Lab, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    raw = PreTrainedTokenizerFast.from_pretrained(lab.student)
    raw.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    raw.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode_prompt("<think>no STOP</think>\n\n5 STOP<|im_end|>")
    assert "<think>" not in tokenizer.decode(ids)
    assert cut(text_of(tokenizer, ids), [" STOP"]) == "5"


def test_a_stop_that_is_a_control_token_ends_an_answer(baseline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``<|im_end|>`` of many tasks does, where a base model has another end of text."""
    generator = opened(baseline, 1)
    tokenizer = generator.text_tokenizer
    ids = tokenizer.encode_prompt("It is 5.<|im_start|> It is 6.")
    says = Writes([*ids.tolist(), tokenizer.eos_id], generator.model.config.vocab_size)
    monkeypatch.setattr(generator.model, "forward", says.__call__)
    assert answers(generator, ["x"], replace(LONG, chat_template=False), until=["Q:", "<|im_start|>"]) == ["It is 5."]
    assert says.passes == len(tokenizer.encode("It is 5.")) + 1
    assert cut(text_of(tokenizer, ids), ["Q:"]) == "It is 5. It is 6."
