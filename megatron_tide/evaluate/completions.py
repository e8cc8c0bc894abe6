"""Completions of code, judged without running them: whether a text parses, and whether it says something.

Parsing alone rewards silence: a model that answers everything with ``return self._t`` parses every time. Length alone
rewards noise. ``both`` is the number to compare. Of an answer that has a code fence, as chat models write, what is
inside the first one is judged (``code_of``), whatever the model.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from megatron_tide.bridge import TextTokenizer
from megatron_tide.data import PreparedData
from megatron_tide.evaluate.bootstrap import mean
from megatron_tide.evaluate.thoughts import text_of, without_thoughts
from megatron_tide.generate import BLOCKS, IN_ORDER, Completion, from_prepared
from megatron_tide.models.families import family_of
from megatron_tide.screen import printable

LONGEST = 8_000  # characters, about 2,000 tokens; the parser's memory and recursion grow with the text
SHORTEST = 40
REPEATS = 3
_OPEN = re.compile(r"^[ \t]*```[^`\n]*\n", re.M)
_CLOSE = re.compile(r"^[ \t]*```", re.M)


def code_of(text: str) -> str:
    """What is inside the first code fence of ``text``, to its end where the fence stays open; without one, ``text``."""
    begin = _OPEN.search(text)
    return _CLOSE.split(text[begin.end() :], maxsplit=1)[0] if begin else text


def parses(text: str) -> bool:
    """Whether ``text`` is one or more statements of Python, as the body of a function may have them; nothing is run."""
    if len(text) > LONGEST:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as "\\d", which are no errors
            return bool(ast.parse(textwrap.dedent(text)).body)  # the parser takes a return outside of a function
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # zero bytes, lone surrogates, nesting too deep
        return False


def says_something(text: str) -> bool:
    """Whether ``text`` has at least ``SHORTEST`` characters and no line ``REPEATS`` times, whatever its indentation."""
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    return len(text.strip()) >= SHORTEST and max(lines.values(), default=0) < REPEATS


@dataclass(frozen=True)
class Completions:
    """A model's answers to the prompts of held-out data, greedy and one token per forward pass by default."""

    texts: list[str]
    """Without thoughts."""
    prompts: list[str]
    references: list[str]
    still_thinking: int = 0
    """Number of texts that are empty because the model was still thinking when its tokens ran out."""

    def to_dict(self, seed: int) -> dict[str, Any]:
        """Counts, mean length of the code in characters, the share of ``both`` with its interval, every text with its
        verdicts.
        """
        codes = [code_of(text) for text in self.texts]
        judged = [
            {"text": text, "parses": parses(code), "says_something": says_something(code)}
            for text, code in zip(self.texts, codes)
        ]
        both = [bool(one["parses"] and one["says_something"]) for one in judged]
        return {
            "count": len(judged),
            "parse": sum(bool(one["parses"]) for one in judged),
            "say_something": sum(bool(one["says_something"]) for one in judged),
            "both": sum(both),
            "both_share": mean(both, seed).to_dict(),
            "still_thinking": self.still_thinking,
            "mean_characters": sum(len(code.strip()) for code in codes) / len(codes),
            "texts": judged,
        }


def completions(
    model: Any,
    tokenizer: TextTokenizer,
    data: PreparedData,
    role: str,
    *,
    count: int,
    batch_size: int,
    label: str = "",
    copies: Sequence[Any] = (),
    **decoding: Any,
) -> Completions:
    """Answer ``count`` prompts of ``data``, evenly spaced, from its ``role`` half (student or teacher).

    ``decoding``: fields of ``DecodingRule``; of these, an autoregressive model uses its numbers of tokens, and takes
    the most likely one. ``copies`` of the model, on other GPUs, share the batches of block decoding.

    Raises:
        ValueError: the model has another tokenizer or chat template than the data.
    """
    prompts = from_prepared(data, tokenizer, count, role)
    ids, found = [prompt.ids for prompt in prompts], dict[int, Completion]()
    if family_of(model).generation == "autoregressive":
        limits = {name: decoding[name] for name in ("max_new_tokens", "min_new_tokens") if name in decoding}
        written = IN_ORDER.answers(model, tokenizer, ids, batch_size=batch_size, temperature=0.0, **limits)
    else:
        rule = {"block_size": data.manifest[role]["block"], "copies": copies, **decoding}
        written = BLOCKS.answers(model, tokenizer, ids, batch_size=batch_size, **rule)
    with tqdm(
        total=len(prompts), desc=printable(f"{label}, completions", keep=""), disable=not label, leave=False
    ) as bar:
        for batch in written:
            found |= batch
            bar.update(len(batch))
    references = [prompt.reference or "" for prompt in prompts]
    shown = [prompt.shown for prompt in prompts]
    texts = [without_thoughts(text_of(tokenizer, found[place].ids), asked) for place, asked in enumerate(shown)]
    return Completions([*texts], shown, references, sum(bool(text.notes) for text in texts))
