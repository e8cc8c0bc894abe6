"""Show how two tokenizers' tokens fall into chunks, in colour: for a text, or for the first texts of a data file.

Both sides of a text are printed one below the other. A chunk has the same colour on both; its tokens are parted by a
bar. Tokens that no chunk covers stand in red. Without colour, chunks are in brackets and uncovered tokens between ~.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from megatron_tide import cli
from megatron_tide.bridge import Aligned, Bridge, TextTokenizer, align_text, load_tokenizer
from megatron_tide.bridge.samples import read_samples
from megatron_tide.bridge.show import NEWLINE, show_piece
from megatron_tide.bridge.summary import summary

# Neighbouring chunks must differ; a third colour keeps them apart across an uncovered stretch too.
CHUNK_COLOURS = ("\033[30;46m", "\033[30;47m", "\033[30;42m")
UNCOVERED_COLOUR = "\033[97;41m"
RESET = "\033[0m"
BREAKING = f"{NEWLINE}\n"  # a line of text stays a line of the terminal


def show_side(tokenizer: TextTokenizer, ids: np.ndarray, chunk: np.ndarray, colour: bool) -> str:
    """One side of an aligned text: ids [n] with chunk ids [n]."""
    pieces = [show_piece(piece, BREAKING) for piece in tokenizer.token_bytes(ids)]
    return "".join(
        _paint("|".join(pieces[place] for place in group), number, colour) for number, group in _runs(chunk.tolist())
    )


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


def _runs(chunk: list[int]) -> Iterator[tuple[int, list[int]]]:
    for number, places in groupby(range(len(chunk)), key=chunk.__getitem__):
        yield number, list(places)


def _paint(text: str, chunk: int, colour: bool) -> str:
    if not colour:
        return f"[{text}]" if chunk >= 0 else f"~{text}~"
    start = CHUNK_COLOURS[chunk % len(CHUNK_COLOURS)] if chunk >= 0 else UNCOVERED_COLOUR
    # A background that is still on at the end of a line would paint the rest of the terminal's row.
    return start + text.replace("\n", f"{RESET}\n{start}") + RESET


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", help="a text to align; or give --data")
    parser.add_argument("--data", type=Path, help="JSONL or Parquet with messages (or text), or a plain text file")
    parser.add_argument("--student", required=True, metavar="TOK", help="folder, hub name, .model or .tiktoken file")
    parser.add_argument("--teacher", required=True, metavar="TOK", help="likewise")
    parser.add_argument("--limit", type=int, default=3, help="texts to show from --data (default: %(default)s)")
    parser.add_argument("--no-color", action="store_true", help="brackets for colours; also NO_COLOR, or no terminal")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the tokenizers' own Python code run")
    args = parser.parse_args(argv)
    if (args.text is None) == (args.data is None):
        raise ValueError("give either a text or --data, one of the two")
    if args.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {args.limit}")
    texts = read_samples([args.data], args.limit) if args.data else [args.text]
    student = load_tokenizer(args.student, trust_remote_code=args.trust_remote_code)
    teacher = load_tokenizer(args.teacher, trust_remote_code=args.trust_remote_code)
    colour = not args.no_color and not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    for text in texts:
        print(show(student, teacher, align_text(student, teacher, text), colour), end="\n\n")
    print("\n".join(summary(Bridge.build(student, teacher, texts))))


if __name__ == "__main__":
    cli.run(main)
