"""Texts that may be a part of a control token, together with what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from megatron_tide.bridge.chat import Range

_USUAL = 64  # characters of a special token


class Edges:
    """Whether a text may begin, end or lie inside one of ``strings``, the rest of which is beside it."""

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = [string for string in strings if len(string) > 1]
        usual = [string for string in self._strings if len(string) <= _USUAL]
        self._longest = max(map(len, usual), default=1)
        self._starts = {string[:size] for string in usual for size in range(1, len(string))}
        self._ends = {string[size:] for string in usual for size in range(1, len(string))}
        for string in self._strings:
            if len(string) > _USUAL:  # any of its letters might
                self._starts |= {*string}
                self._ends |= {*string}

    def of(self, text: str, normal: Callable[[str], str] = str) -> list[Range]:
        """The first and the last letter of ``text``, where it may; ``normal``: what a tokenizer does to a text."""
        own, place = text.strip(), len(text) - len(text.lstrip())
        if not own:
            return []
        sizes, near = range(1, self._longest + 1), 4 * self._longest
        heads, tails = ({part, normal(part).strip()} for part in (own[:near], own[-near:]))
        first = any(head[:size] in self._ends for head in heads for size in sizes)
        last = any(tail[-size:] in self._starts for tail in tails for size in sizes)
        within = len(own) < near and any(head in string for head in heads for string in self._strings)
        places = [place] * (first or within) + [place + len(own) - 1] * last
        return [(one, one + 1) for one in sorted({*places})]
