"""Groups of bodies that are equal or nearly equal code, so that a split can keep each group together.

Code is compared as Python's tokens without comments, layout and values of literals. Two bodies are near-equal if

- their tokens are equal; or
- their tokens are equal once every name is replaced by the place of its first use, from ``RENAMED`` tokens on (shorter
  ones are common phrases: ``return self.x``); or
- at least ``SIMILAR`` of the runs of ``SHINGLE`` tokens that occur in either occur in both (Jaccard similarity).

A group is whatever such pairs connect. The search is exact: two sets of similarity s or more share an element among
the first n - ceil(s n) + 1 of each set's n elements, in any common order. Rare elements first make that list short
(prefix filtering: Chaudhuri, Ganti, Kaushik, "A primitive operator for similarity joins in data cleaning", 2006).
"""

from __future__ import annotations

import io
import keyword
import math
import tokenize
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

SIMILAR = 0.6
SHINGLE = 4
RENAMED = 16
_LAYOUT = frozenset({"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER", "TYPE_COMMENT"})
Shingles = frozenset[tuple[str, ...]]


def code_tokens(body: str) -> list[str]:
    """Python's tokens of ``body``, which must be valid code; a literal as its kind."""
    tokens = []
    for token in tokenize.generate_tokens(io.StringIO(body + "\n").readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("STRING", "FSTRING_START", "TSTRING_START"):  # Python 3.12 splits f-strings into their parts
            tokens.append('""')
        elif kind == "NUMBER":
            tokens.append("0")
        elif kind not in _LAYOUT and not kind.startswith(("FSTRING", "TSTRING")):
            tokens.append(token.string)
    return tokens


def renamed(tokens: Sequence[str]) -> tuple[str, ...]:
    """``tokens`` with each name as the number of its first use."""
    names: dict[str, str] = {}
    return tuple(
        names.setdefault(token, f"name{len(names)}") if token.isidentifier() and not keyword.iskeyword(token) else token
        for token in tokens
    )


def shingles(tokens: Sequence[str]) -> Shingles:
    """Every run of ``SHINGLE`` tokens; all of them as one where there are fewer."""
    return frozenset(tuple(tokens[first : first + SHINGLE]) for first in range(max(1, len(tokens) - SHINGLE + 1)))


def similarity(one: Shingles, other: Shingles) -> float:
    """The share of all elements that both sets have."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def near_duplicates(bodies: Sequence[str]) -> list[int]:
    """For each of ``bodies`` the place of the first one of its group."""
    first_of = list(range(len(bodies)))

    def first(place: int) -> int:
        while first_of[place] != place:
            first_of[place] = first_of[first_of[place]]
            place = first_of[place]
        return place

    tokens = [code_tokens(body) for body in bodies]
    for one, other in (*_equal(tokens), *_similar([shingles(found) for found in tokens])):
        low, high = sorted((first(one), first(other)))
        first_of[high] = low
    return [first(place) for place in range(len(bodies))]


def _equal(tokens: Sequence[Sequence[str]]) -> Iterator[tuple[int, int]]:
    seen: dict[Hashable, int] = {}
    for place, found in enumerate(tokens):
        yield place, seen.setdefault(tuple(found), place)
        if len(found) >= RENAMED:
            yield place, seen.setdefault(("renamed", renamed(found)), place)


def _similar(sets: Sequence[Shingles]) -> Iterator[tuple[int, int]]:
    """All pairs of places whose similarity is ``SIMILAR`` or more."""
    counts = Counter(shingle for found in sets for shingle in found)
    holders: dict[Hashable, list[int]] = defaultdict(list)
    for place, found in enumerate(sets):
        rare_first = sorted(found, key=lambda shingle: (counts[shingle], shingle))
        prefix = rare_first[: len(found) - math.ceil(SIMILAR * len(found)) + 1]
        for other in {other for shingle in prefix for other in holders[shingle]}:
            if similarity(found, sets[other]) >= SIMILAR:
                yield place, other
        for shingle in prefix:
            holders[shingle].append(place)
