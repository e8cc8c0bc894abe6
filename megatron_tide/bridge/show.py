"""Tokens for people: every byte visible, nothing that acts on a terminal or hides."""

from __future__ import annotations

import unicodedata

SPACE, NEWLINE = "\u00b7", "\u23ce"


def show_piece(piece: bytes, newline: str = NEWLINE) -> str:
    """A token's bytes as printable text: spaces and line ends visible, control characters, broken UTF-8 as escapes."""
    text = piece.decode("utf-8", errors="backslashreplace")
    return "".join(_show(char, newline) for char in text)


def _show(char: str, newline: str) -> str:
    if char == "\n":
        return newline
    if char == " ":
        return SPACE
    # Control, format and unassigned characters could move the cursor, or hide; the terminal must not act on the data.
    if unicodedata.category(char).startswith(("C", "Z")):
        return char.encode("unicode_escape").decode("ascii")
    return char
