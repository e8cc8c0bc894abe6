"""Prompts in ids -> completions in text, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_tide.bridge import TextTokenizer
from megatron_tide.models.generation_a2d import BlockDecoder, decoding_rule


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt: its ids (the end of text included where it came), its text, and whether it came."""

    ids: list[int]
    text: str
    finished: bool
    passes: int
    """Forward passes of the batch it was in."""


def prompt_ids(tokenizer: TextTokenizer, messages: Iterable[dict[str, Any]]) -> np.ndarray:
    """int32 [n]: a conversation as the model was trained on it, up to where its answer begins."""
    return tokenizer.encode_prompt(tokenizer.render(messages, add_generation_prompt=True))


def complete(
    model: Any,
    tokenizer: TextTokenizer,
    prompts: Sequence[np.ndarray | Sequence[int]],
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **knobs: Any,
) -> list[Completion]:
    """Answer ``prompts`` (ids), in their order. Prompt i draws from seed + i, so batches do not change an answer.

    ``knobs``: fields of ``DecodingRule``; ids and block size come from the model's config and the tokenizer.
    ``progress(done)`` is called after each batch.

    Raises:
        ValueError: an empty prompt, a wrong knob, or a model that cannot decode in blocks.
    """
    if not hasattr(model, "generate"):
        raise ValueError(f"{type(model).__name__} cannot decode in blocks here; give an a2d-qwen3 model (a student)")
    if batch_size < 1:
        raise ValueError(f"generate: batch size {batch_size}; give 1 or more")
    for place, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"generate: prompt {place} is empty")
    ids = {"mask_token_id": tokenizer.mask_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    rule = decoding_rule(model, None, ids | knobs)
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    answers: dict[int, Completion] = {}
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = [torch.as_tensor(np.asarray(prompts[place]), dtype=torch.int64) for place in places]
        decoder = BlockDecoder(model, batch, rule, [seed + place for place in places])
        for _ in decoder.run():
            pass
        for place, answer in zip(places, decoder.completions()):
            found = answer.tolist()
            ended = found[-1] in rule.eos_token_ids
            answers[place] = Completion(found, tokenizer.decode(found), ended, decoder.passes)
        if progress is not None:
            progress(len(answers))
    return [answers[place] for place in range(len(prompts))]
