"""Alignment of 1,000-token texts: cumulative byte offsets in numpy against a plain Python two-pointer loop, in one run.

Both start from the same token ids and the same byte-length table, and end with one chunk id per token on both sides. The
loop is given its table and ids as plain Python lists, which is what suits it best.
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
from megatron_tide.bridge import align_lengths, load_tokenizer
from megatron_tide.bridge.byte_table import ByteTable
from tools.train_tokenizers import train_byte_bpe, train_sentencepiece

STUDENT_VOCABULARY, TEACHER_VOCABULARY = 4096, 8192


def two_pointer(
    student_ids: list[int], teacher_ids: list[int], student_table: list[int], teacher_table: list[int]
) -> tuple[list[int], list[int], int]:
    """The plain way: walk both sides, always advancing the one that is behind; a chunk ends where both are level."""
    student_chunk, teacher_chunk = [], []
    s = t = student_end = teacher_end = chunk = 0
    while s < len(student_ids) or t < len(teacher_ids):
        if student_end <= teacher_end and s < len(student_ids):
            student_end += student_table[student_ids[s]]
            student_chunk.append(chunk)
            s += 1
        else:
            teacher_end += teacher_table[teacher_ids[t]]
            teacher_chunk.append(chunk)
            t += 1
        if student_end == teacher_end:
            chunk += 1
    return student_chunk, teacher_chunk, chunk


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--tokens", type=int, default=1000, help="student tokens a text (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=64, help="texts a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=25, help="rounds; the median counts (default: %(default)s)")
    args = parser.parse_args(argv)
    source = [
        Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in (ast, argparse, inspect, tempfile)
    ]
    with tempfile.TemporaryDirectory() as folder:
        student = load_tokenizer(train_byte_bpe(f"{folder}/student", source, STUDENT_VOCABULARY))
        teacher = load_tokenizer(train_sentencepiece(f"{folder}/teacher", source, TEACHER_VOCABULARY))
    whole = "".join(source)
    starts = np.random.default_rng(0).integers(0, len(whole) // 2, args.texts)
    sides, tables = [], [ByteTable([tok.token_bytes(i) for i in range(tok.vocab_size)]) for tok in (student, teacher)]
    for start in starts.tolist():
        # Cut by tokens, then encode what they spell: whole texts for both sides.
        text = student.decode(student.encode(whole[start:])[: args.tokens])
        sides.append((student.encode(text), teacher.encode(text)))
    lists = [(left.tolist(), right.tolist()) for left, right in sides]
    lengths = [table.length.tolist() for table in tables]

    def plain() -> list[tuple[list[int], list[int], int]]:
        return [two_pointer(left, right, *lengths) for left, right in lists]

    def vectorised() -> list[tuple[np.ndarray, np.ndarray, int]]:
        return [align_lengths(tables[0].lengths(left), tables[1].lengths(right)) for left, right in sides]

    for ours, theirs in zip(vectorised(), plain()):
        assert ours[0].tolist() == theirs[0], "the two ways disagree on the student's chunks"
        assert ours[1].tolist() == theirs[1], "the two ways disagree on the teacher's chunks"
    seconds = paired_seconds([plain, vectorised], args.rounds)
    figures = {
        "student_tokens": int(np.mean([len(left) for left, _ in sides])),
        "teacher_tokens": int(np.mean([len(right) for _, right in sides])),
        "loop_seconds_per_text": seconds[0] / args.texts,
        "numpy_seconds_per_text": seconds[1] / args.texts,
        "speedup": seconds[0] / seconds[1],
    }
    report("align", figures, args.json)


if __name__ == "__main__":
    cli.run(main)
