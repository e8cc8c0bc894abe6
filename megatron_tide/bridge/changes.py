"""What a tokenizer changes of a text before a model reads it."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_tide.bridge.tokenizer import TextTokenizer


def changes(text: str, spelled: bytes) -> str:
    """In words, the first place where a tokenizer's tokens, ``spelled``, are not the user's ``text`` (lower case, no
    accents, fewer spaces, a letter unknown); "" where all are. A space that it writes before a text counts as nothing.
    """
    found = spelled.decode("utf-8", errors="replace")
    found = found if text.startswith(" ") else found.removeprefix(" ")
    if found == text:
        return ""
    place = next((n for n, pair in enumerate(zip(text, found)) if pair[0] != pair[1]), min(len(text), len(found)))
    return f"{text[place : place + 20]!r} is read as {found[place : place + 20]!r}"


def first_change(tokenizer: TextTokenizer, texts: Iterable[str]) -> str:
    """``changes`` of the first of ``texts`` that has some."""
    found = (changes(text, tokenizer.encode_with_bytes(text).data) for text in texts)
    return next(filter(None, found), "")
