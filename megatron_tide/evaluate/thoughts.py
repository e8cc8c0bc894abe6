"""Thoughts and answers: what a model writes in ``<think>...</think>``, or other marks, is no part of its answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_tide.bridge import TextTokenizer
from megatron_tide.bridge.chat import Rendered
from megatron_tide.bridge.template import MARKS_OF_THOUGHTS

MARKS = {*MARKS_OF_THOUGHTS, *MARKS_OF_THOUGHTS.values()}
_ALWAYS = "<think>"  # its end counts also where no start was seen: some templates write that themselves
STILL_THINKING = "were still thinking when their tokens ran out: they count as empty; raise --max-new-tokens"


class Answer(str):
    """An answer. ``notes``: what a reader of its score should know; "N answers" comes before. ``tokens``: how many were
    written, also those that were cut off, in how many forward ``passes`` (0: not known).
    """

    notes: tuple[str, ...]
    tokens: int
    passes: int

    def __new__(cls, text: str, notes: tuple[str, ...] = (), tokens: int = 0, passes: int = 0) -> Answer:
        answer = super().__new__(cls, text)
        answer.notes, answer.tokens, answer.passes = notes, tokens, passes
        return answer


def opened_by(prompt: str) -> str:
    """The mark of thoughts that a prompt ends in, so that an answer begins with them and no mark; "" for none."""
    return next((mark for mark in MARKS_OF_THOUGHTS if prompt.rstrip().endswith(mark)), "")


def closed(prompt: Rendered) -> Rendered:
    """``prompt`` with its thoughts, if it ends in some, left empty: for an answer that is begun already."""
    mark = opened_by(prompt)
    return Rendered(f"{prompt.rstrip()}\n\n{MARKS_OF_THOUGHTS[mark]}\n\n", prompt.content) if mark else prompt


def without_thoughts(text: str, prompt: str = "") -> Answer:
    """The answer behind the thoughts; empty, with a note, where a model was still thinking when its tokens ran out."""
    begun = opened_by(prompt)
    mark = begun or next((one for one in MARKS_OF_THOUGHTS if text.lstrip().startswith(one)), _ALWAYS)
    _, end, answer = text.rpartition(MARKS_OF_THOUGHTS[mark])
    answer = answer.lstrip("\n") if end else text
    thinking = answer.lstrip().startswith(mark) or (not end and begun)
    return Answer("", (STILL_THINKING,)) if thinking else Answer(answer)


def cut(text: str, stops: Sequence[str], prompt: str = "") -> Answer:
    """The answer, without thoughts, before the first of ``stops``; all of it where none occurs."""
    answer = without_thoughts(text, prompt)
    end = min((place for stop in stops if stop and (place := answer.find(stop)) >= 0), default=len(answer))
    return Answer(answer[:end], answer.notes)


def text_of(tokenizer: TextTokenizer, ids: Sequence[int] | np.ndarray, stops: Sequence[str] = ()) -> str:
    """Text of ``ids`` without special tokens, but with the marks of thoughts and ``stops`` that are tokens, such as
    ``<|im_end|>`` of a base model that ends its texts with another.
    """
    special, shown = tokenizer.special_ids, {*MARKS, *stops}
    kept = [int(one) for one in ids if int(one) not in special or tokenizer.id_to_token(int(one)) in shown]
    return tokenizer.decode(kept, skip_special=False)
