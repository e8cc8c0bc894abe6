"""Tokens and chunks for people: every byte visible, nothing that acts on a terminal or hides."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from megatron_tide.bridge.artifact import Aligned
from megatron_tide.bridge.tokenizer import TextTokenizer
from megatron_tide.screen import printable

SPACE, NEWLINE = "\u00b7", "\u23ce"
# Neighbouring chunks must differ; a third colour keeps them apart across an unaligned stretch too.
CHUNK_COLOURS = ("\033[30;46m", "\033[30;47m", "\033[30;42m")
UNALIGNED_COLOUR = "\033[97;41m"
RESET = "\033[0m"


def show_piece(piece: bytes, newline: str = NEWLINE) -> str:
    """A token's bytes as printable text: spaces and line ends visible, control characters, broken UTF-8 as escapes."""
    lines = piece.decode("utf-8", errors="backslashreplace").split("\n")
    return newline.join(printable(line, keep="").replace(" ", SPACE) for line in lines)


def show(student: TextTokenizer, teacher: TextTokenizer, aligned: Aligned, colour: bool) -> str:
    """Both sides of an aligned text, with their token and chunk counts."""
    sides = (
        ("student", student, aligned.student_ids, aligned.student_chunk),
        ("teacher", teacher, aligned.teacher_ids, aligned.teacher_chunk),
    )
    lines = [
        f"{name}, {len(ids)} tokens:\n{show_side(tokenizer, ids, chunk, colour)}"
        for name, tokenizer, ids, chunk in sides
    ]
    covered = f"{aligned.covered_bytes} of {aligned.total_bytes} bytes"
    lines.append(f"{aligned.n_chunks} chunks, {aligned.one_to_one()} one-to-one, {covered} covered")
    return "\n".join(lines)


def show_side(tokenizer: TextTokenizer, ids: np.ndarray, chunk: np.ndarray, colour: bool) -> str:
    """One side of an aligned text: ids [n] with chunk ids [n]."""
    # A line of the text stays a line of the terminal.
    pieces = [show_piece(piece, f"{NEWLINE}\n") for piece in tokenizer.token_bytes(ids)]
    return "".join(
        _paint("|".join(pieces[place] for place in group), number, colour) for number, group in _runs(chunk.tolist())
    )


def _runs(chunk: list[int]) -> Iterator[tuple[int, list[int]]]:
    for number, places in groupby(range(len(chunk)), key=chunk.__getitem__):
        yield number, list(places)


def _paint(text: str, chunk: int, colour: bool) -> str:
    if not colour:
        return f"[{text}]" if chunk >= 0 else f"~{text}~"
    start = CHUNK_COLOURS[chunk % len(CHUNK_COLOURS)] if chunk >= 0 else UNALIGNED_COLOUR
    # A background that is still on at the end of a line would paint the rest of the terminal's row.
    return start + text.replace("\n", f"{RESET}\n{start}") + RESET
