"""Answers of an autoregressive model: those of a plain loop, in any batch, streamed or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

from megatron_tide.bridge import TextTokenizer, load_tokenizer
from megatron_tide.generate import from_text
from megatron_tide.generate.in_order import answers, stream
from megatron_tide.models.autoregressive import load_autoregressive, most_rows
from tests.support.answering import write_autoregressive
from tests.support.lab import Lab

NEW = 7


@pytest.fixture(scope="module")
def made(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TextTokenizer]:
    folder: Path = write_autoregressive(tmp_path_factory.mktemp("ar") / "ar", lab.student)
    return load_autoregressive(folder, torch.float32, "cpu")[0], load_tokenizer(folder)


def plain(model: Any, ids: list[int], ends: int) -> list[int]:
    """The likeliest tokens, each from a pass over the whole text."""
    written: list[int] = []
    while len(written) < NEW and ends not in written:
        with torch.inference_mode():
            written.append(int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
    return written


@pytest.mark.parametrize("batch_size", [1, 3])
def test_likeliest_tokens(made: tuple[Any, TextTokenizer], batch_size: int) -> None:
    model, tokenizer = made
    prompts = [from_text(tokenizer, text).ids for text in ("a long question " * 4, "hi", "what is it, and why?")]
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.0, "seed": 0}
    found = {}
    for batch in answers(model, tokenizer, prompts, batch_size=batch_size, **options):
        found |= batch
    for place, prompt in enumerate(prompts):
        expected = plain(model, prompt.tolist(), tokenizer.eos_id)
        assert found[place].ids == expected
        moments = list(stream(model, tokenizer, prompt, **options))
        assert moments[-1].ids == expected
        assert "".join(moment.new_text for moment in moments) == found[place].text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_outputs_that_are_no_numbers_end_it_in_one_line(
    made: tuple[Any, TextTokenizer], monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    model, tokenizer = made
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: hidden.new_full((*hidden.shape[:-1], 64), torch.nan))
    prompt = from_text(tokenizer, "hi").ids
    for asked in (stream(model, tokenizer, prompt, temperature=temperature, seed=0),
                  answers(model, tokenizer, [prompt], temperature=temperature, max_new_tokens=2, seed=0)):  # fmt: skip
        with pytest.raises(ValueError, match="the model's outputs are not numbers"):
            list(asked)


def test_draws_do_not_depend_on_the_batch(made: tuple[Any, TextTokenizer]) -> None:
    model, tokenizer = made
    prompts = [from_text(tokenizer, text).ids for text in ("one", "two and more", "three")]
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0}
    whole = {}
    for batch in answers(model, tokenizer, prompts, batch_size=8, seed=4, **options):
        whole |= batch
    (alone,) = answers(model, tokenizer, prompts[1:2], seed=[5], **options)
    assert alone[0].ids == whole[1].ids
    assert whole[0].ids != whole[2].ids


def test_gaps_are_refused_by_name(made: tuple[Any, TextTokenizer]) -> None:
    model, tokenizer = made
    for write in (lambda *rest, **how: answers(*rest[:2], [rest[2]], **how), stream):
        with pytest.raises(ValueError, match=r"is autoregressive: it fills in no gaps \(--infill\)"):
            next(write(model, tokenizer, from_text(tokenizer, "hi").ids, max_new_tokens=0, temperature=0.0, seed=0))


def test_the_least_number_of_tokens(made: tuple[Any, TextTokenizer]) -> None:
    model, tokenizer = made
    prompt = from_text(tokenizer, "hi").ids
    model.config.eos_token_id = plain(model, prompt.tolist(), -1)[0]  # what it would write first ends an answer now
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": 3, "temperature": 0.0, "seed": 0}
    (found,) = answers(model, tokenizer, [prompt], **options)
    assert len(found[0].ids) >= 3
    assert list(stream(model, tokenizer, prompt, **options))[-1].ids == found[0].ids


@pytest.mark.parametrize(("kind", "rows"), [(RwkvForCausalLM, 1), (MambaForCausalLM, 2)])
def test_a_recurrent_model_in_a_batch_and_streamed(made: tuple[Any, TextTokenizer], kind: Any, rows: int) -> None:
    """Padding may enter its state, and what it returns has no keys and values."""
    tokenizer, ends = made[1], {"bos_token_id": None, "eos_token_id": made[1].eos_id}
    torch.manual_seed(0)
    config = {RwkvForCausalLM: RwkvConfig, MambaForCausalLM: MambaConfig}[kind]
    model = kind(config(vocab_size=320, hidden_size=32, num_hidden_layers=2, **ends)).eval()
    assert most_rows(model, 2) == rows
    prompts = [from_text(tokenizer, text).ids for text in ("a long question " * 2, "hi")]
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0.0, "seed": 0}
    found = {}
    for batch in answers(model, tokenizer, prompts, batch_size=2, **options):
        found |= batch
    for place, prompt in enumerate(prompts):
        assert found[place].ids == plain(model, prompt.tolist(), tokenizer.eos_id)
        assert list(stream(model, tokenizer, prompt, **options))[-1].ids == found[place].ids
