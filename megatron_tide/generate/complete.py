"""Prompt ids -> completion text, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_tide.bridge import TextTokenizer
from megatron_tide.generate.copies import shared
from megatron_tide.models.decoding_a2d import BlockDecoder
from megatron_tide.models.families import family_of
from megatron_tide.models.generation_a2d import decoding_rule
from megatron_tide.models.sampling_a2d import DecodingRule

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for a character whose last bytes are still to come


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt: ids (with the end-of-text token, if reached), text, and ``finished``: whether it was
    reached.

    ``prompt``: the prompt's ids, its mask tokens filled in. ``passes``: forward passes of the batch it was in;
    ``own_passes``: those that decided some of it, which do not depend on the batch; ``order``: which of them decided
    each of the ids, from 1 (empty where tokens are written one after the other).
    """

    ids: list[int]
    text: str
    finished: bool
    passes: int
    prompt: list[int]
    own_passes: int = 0
    order: Sequence[int] = ()


def prompt_ids(tokenizer: TextTokenizer, messages: Iterable[dict[str, Any]]) -> np.ndarray:
    """int32 [n]: a conversation in the training format, up to the start of the answer."""
    return tokenizer.encode_prompt(tokenizer.render(messages, add_generation_prompt=True))


def complete(
    model: Any,
    tokenizer: TextTokenizer,
    prompts: Sequence[np.ndarray | Sequence[int]],
    *,
    batch_size: int = 8,
    seed: int | Sequence[int] = 0,
    progress: Callable[[int], None] | None = None,
    copies: Sequence[Any] = (),
    **options: Any,
) -> list[Completion]:
    """Answer ``prompts`` (ids), in their order. Prompt i draws from seed + i, so batches do not change an answer.

    ``options``: fields of ``DecodingRule``; ids and block size come from the model's config and the tokenizer.
    ``progress(done)`` is called after each batch. ``copies`` of the model, on other GPUs, share the batches.

    Raises:
        ValueError: an empty prompt or a wrong option.
    """
    found: dict[int, Completion] = {}
    for batch in answers(model, tokenizer, prompts, batch_size=batch_size, seed=seed, copies=copies, **options):
        found |= batch
        if progress is not None:
            progress(len(found))
    return [found[place] for place in range(len(prompts))]


def answers(
    model: Any,
    tokenizer: TextTokenizer,
    prompts: Sequence[np.ndarray | Sequence[int]],
    *,
    batch_size: int = 8,
    seed: int | Sequence[int] = 0,
    copies: Sequence[Any] = (),
    **options: Any,
) -> Iterator[dict[int, Completion]]:
    """As ``complete``, batch by batch: {place of the prompt: its answer}, prompts of similar length together."""
    check_prompts(model, prompts, batch_size)
    batch_size = min(batch_size, getattr(model, "rows_at_once", batch_size))
    rule = _rule(model, tokenizer, options)
    seeds = [seed + place for place in range(len(prompts))] if isinstance(seed, int) else seed

    def answer(model: Any, places: list[int]) -> dict[int, Completion]:
        batch = [torch.as_tensor(np.asarray(prompts[place]), dtype=torch.int64) for place in places]
        decoder = BlockDecoder(model, batch, rule, [seeds[place] for place in places])
        for _ in decoder.run():
            pass
        done: dict[int, Completion] = {}
        each = zip(places, decoder.completions(), decoder.prompts(), decoder.passes_B.tolist(), decoder.orders())
        for place, ids, prompt_ids, own, order in each:
            found, prompt = ids.tolist(), prompt_ids.tolist()
            ended = bool(found) and found[-1] in rule.eos_token_ids
            text = tokenizer.decode(found)
            done[place] = Completion(found, text, ended, decoder.passes, prompt, own, order.tolist())
        return done

    yield from shared([model, *copies], answer, batches_by_length(prompts, batch_size))


def batches_by_length(prompts: Sequence[np.ndarray | Sequence[int]], size: int) -> list[list[int]]:
    """Places of prompts of similar length, ``size`` together."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    return [order[first : first + size] for first in range(0, len(order), size)]


def check_prompts(model: Any, prompts: Sequence[np.ndarray | Sequence[int]], batch_size: int = 1) -> None:
    """ValueError for an empty prompt, a token that ``model`` does not have, or an impossible batch size."""
    if batch_size < 1:
        raise ValueError(f"generate: batch size {batch_size}; give 1 or more")
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"generate: prompt {place} is empty")
        check_tokens(model, f"prompt {place}", prompt)


def check_tokens(model: Any, what: str, ids: np.ndarray | Sequence[int]) -> None:
    """ValueError for a token that ``model`` does not have."""
    size = getattr(model.config, "vocab_size", None)
    if size is not None and max(ids) >= size:
        raise ValueError(f"generate: {what} has token {max(ids)}, the model {size} tokens; use its own tokenizer")


@dataclass(frozen=True)
class Moment:
    """The state of one answer after a pass: ids up to the end of the current block, and which of them are decided.

    ``new_text``: text that became final since the previous state; a block's text comes when the block is finished.
    """

    ids: list[int]
    decided: list[bool]
    new_text: str


def stream(
    model: Any, tokenizer: TextTokenizer, prompt: np.ndarray | Sequence[int], *, seed: int = 0, **options: Any
) -> Iterator[Moment]:
    """Answer one prompt pass by pass: all ``new_text`` joined is the text that ``complete`` returns.

    Raises:
        ValueError: an empty prompt or a wrong option.
    """
    check_prompts(model, [prompt])
    ids = torch.as_tensor(np.asarray(prompt), dtype=torch.int64)
    decoder = BlockDecoder(model, [ids], _rule(model, tokenizer, options), [seed])
    shown = ""
    for block_is_done in decoder.run():
        text = shown
        if block_is_done:
            text = tokenizer.decode(decoder.completions(settled=True)[0].tolist()).rstrip(UNFINISHED)
        yield _moment(decoder, text[len(shown) :])
        shown = text
    text = tokenizer.decode(decoder.completions()[0].tolist())
    if text != shown:
        yield _moment(decoder, text[len(shown) :])


def _moment(decoder: BlockDecoder, new_text: str) -> Moment:
    begin = int(decoder.answer_dev_B[0])
    ids = decoder.completions()[0][: max(0, decoder.end - begin)].tolist()
    decided = ~decoder.undecided_BL[0, begin : begin + len(ids)]
    return Moment(ids, decided.tolist(), new_text)


def _rule(model: Any, tokenizer: TextTokenizer, options: dict[str, Any]) -> DecodingRule:
    if family_of(model).generation != "block_diffusion":
        raise ValueError(
            f"generate: a {model.config.model_type} model is autoregressive and does not decode in blocks; "
            "the generate command writes with it"
        )
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    check_tokens(model, "the tokenizer", list(ids.values()))
    stated = getattr(model.config, "mask_token_id", None)
    if stated not in (None, tokenizer.mask_id):
        raise ValueError(
            f"generate: the model's config.json has mask_token_id {stated}, its tokenizer's mask is "
            f"{tokenizer.mask_id}; name that token as mask_token in tokenizer_config.json"
        )
    return decoding_rule(model, None, ids | options)


class Writer(NamedTuple):
    """How models of one kind write: batches of answers, and one answer as it comes."""

    answers: Callable[..., Iterator[dict[int, Completion]]]
    stream: Callable[..., Iterator[Moment]]


BLOCKS = Writer(answers, stream)
