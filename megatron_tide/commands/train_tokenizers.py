"""Train a student's and a teacher's tokenizer that differ like those of real models.

The student's is byte-level BPE (tokenizer.json) with Qwen's chat format; the teacher's is SentencePiece unigram with
byte fallback (tokenizer.model) and LLaDA2's chat format. The same data and sizes give the same files, byte for byte.

Examples:
  python -m megatron_tide train-tokenizers --data runs/quickstart/corpus/train.jsonl \\
      --student-out runs/mine/tokenizers/student --teacher-out runs/mine/tokenizers/teacher
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.cli import flag, say

_SIZES: dict[str, Any] = {"low": 1, "high": 1 << 20}  # SentencePiece runs without end for the largest numbers


@dataclass(frozen=True, kw_only=True)
class Args:
    data: Path = flag(..., 'Training text: JSONL, one {"messages": [...]} per line', metavar="FILE", reads="file")
    student_out: Path = flag(..., "Folder to write the student's tokenizer to", metavar="DIR")
    teacher_out: Path = flag(..., "Folder to write the teacher's tokenizer to", metavar="DIR")
    student_vocab: int = flag(2048, "Vocabulary size of the student's tokenizer, special tokens included", **_SIZES)
    teacher_vocab: int = flag(4096, "Vocabulary size of the teacher's tokenizer, special tokens included", **_SIZES)
    fresh: bool = flag(False, "Train again, and replace tokenizers that this command made")


def run(args: Args) -> None:
    from megatron_tide.bridge.train_tokenizers import train_tokenizers

    for line in train_tokenizers(
        args.data, args.student_out, args.teacher_out, args.student_vocab, args.teacher_vocab, args.fresh
    ):
        say(line, flush=True)
