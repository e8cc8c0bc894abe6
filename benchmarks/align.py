"""Alignment of 1,000-token texts: cumulative byte offsets in numpy against a plain Python two-pointer loop, in one run.

Both get what data preparation has, an int32 array of token ids per side and text, and give what it keeps, an int32
array of chunk ids per side and text. The loop takes one text after the other, and knows each token's bytes by a list
lookup. Numpy takes the texts in data preparation's own groups (TEXTS_AT_ONCE); looking up each token's length in a
table, laying a group's texts end to end and parting them again is timed with the rest. Neither compares bytes.
Tokenising is not timed. Texts are Python source, the tokenizers the quickstart's two kinds.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.common import paired_seconds, report
from megatron_tide import cli
from megatron_tide.bridge import TEXTS_AT_ONCE, align_batch, load_tokenizer
from megatron_tide.bridge.byte_table import ByteTable
from megatron_tide.bridge.train_tokenizers import train_byte_bpe, train_sentencepiece

STUDENT_VOCABULARY, TEACHER_VOCABULARY = 4096, 8192


def two_pointer(
    student_ids: np.ndarray, teacher_ids: np.ndarray, student_bytes: list[bytes], teacher_bytes: list[bytes]
) -> tuple[np.ndarray, np.ndarray, int]:
    """The plain way: walk both sides, always advancing the one that is behind; a chunk ends where both are level."""
    students, teachers = student_ids.tolist(), teacher_ids.tolist()
    student_chunk, teacher_chunk = [], []
    s = t = student_end = teacher_end = chunk = 0
    while s < len(students) or t < len(teachers):
        if student_end <= teacher_end and s < len(students):
            student_end += len(student_bytes[students[s]])
            student_chunk.append(chunk)
            s += 1
        else:
            teacher_end += len(teacher_bytes[teachers[t]])
            teacher_chunk.append(chunk)
            t += 1
        if student_end == teacher_end:
            chunk += 1
    return np.array(student_chunk, dtype=np.int32), np.array(teacher_chunk, dtype=np.int32), chunk


def main(argv: list[str]) -> None:
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--tokens", type=int, default=1000, help="student tokens a text (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=256, help="texts a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="rounds, of which the median (default: %(default)s)")
    args = parser.parse_args(argv)
    source = [
        Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in (ast, argparse, inspect, tempfile)
    ]
    with tempfile.TemporaryDirectory() as folder:
        student = load_tokenizer(train_byte_bpe(f"{folder}/student", source, STUDENT_VOCABULARY))
        teacher = load_tokenizer(train_sentencepiece(f"{folder}/teacher", source, TEACHER_VOCABULARY))
    whole = "".join(source)
    starts = np.random.default_rng(0).integers(0, len(whole) // 2, args.texts)
    sides = []
    for start in starts.tolist():
        # Cut by tokens, then encode what they spell: whole texts for both sides.
        text = student.decode(student.encode(whole[start:])[: args.tokens])
        sides.append((student.encode(text), teacher.encode(text)))
    pieces = [[tok.id_to_bytes(index) or b"" for index in range(tok.vocab_size)] for tok in (student, teacher)]
    tables = [ByteTable(side) for side in pieces]

    def plain() -> list[tuple[np.ndarray, np.ndarray, int]]:
        return [two_pointer(left, right, *pieces) for left, right in sides]

    def vectorised() -> list[tuple[np.ndarray, np.ndarray, int]]:
        aligned = []
        for start in range(0, len(sides), TEXTS_AT_ONCE):
            group = sides[start : start + TEXTS_AT_ONCE]
            students = [tables[0].lengths(left) for left, _ in group]
            teachers = [tables[1].lengths(right) for _, right in group]
            aligned.extend(align_batch(students, teachers))
        return aligned

    for ours, theirs in zip(vectorised(), plain(), strict=True):
        agree = np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1]) and ours[2] == theirs[2]
        assert agree, "the two ways disagree"
    seconds = paired_seconds([plain, vectorised], args.rounds)
    figures = {
        "texts": args.texts,
        "texts_at_once": TEXTS_AT_ONCE,
        "rounds": args.rounds,
        "student_tokens": int(np.mean([len(left) for left, _ in sides])),
        "teacher_tokens": int(np.mean([len(right) for _, right in sides])),
        "loop_seconds_per_text": seconds[0] / args.texts,
        "numpy_seconds_per_text": seconds[1] / args.texts,
        "speedup": seconds[0] / seconds[1],
    }
    report("align", figures, args.json)


if __name__ == "__main__":
    cli.run(main)
