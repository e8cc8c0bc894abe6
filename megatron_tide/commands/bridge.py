"""Build the bridge between two tokenizers, which aligns their tokens in chunks.

Compares the vocabularies, aligns a sample of the data with both tokenizers, and writes manifest.json and
vocab_map.safetensors. Fails if chunks cover too few of the sample's bytes: then the two tokenizers change the text in
different ways, and distillation would use only a part of it. A finished bridge of the same tokenizers and sample is
kept.

Examples:
  python -m megatron_tide bridge --student runs/quickstart/tokenizers/student \\
      --teacher runs/quickstart/tokenizers/teacher --sample runs/quickstart/corpus/train.jsonl --out runs/mine/bridge
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say
from megatron_tide.commands import COVERAGE_FLOOR, mask_flag

_TOKENIZER = "Hugging Face folder or hub name, SentencePiece .model file, or .tiktoken file"


@dataclass(frozen=True, kw_only=True)
class Args:
    student: str = flag(..., f"Tokenizer of the student: {_TOKENIZER}", metavar="TOKENIZER")
    teacher: str = flag(..., "Tokenizer of the teacher, in the same forms", metavar="TOKENIZER")
    sample: tuple[Path, ...] = flag(
        ...,
        "Sample texts: JSONL or Parquet with messages or text, plain text files, or folders of such files",
        metavar="DATA",
    )
    out: Path = flag(..., "Folder to write the bridge to", metavar="DIR")
    student_mask: str | None = mask_flag("student")
    teacher_mask: str | None = mask_flag("teacher")
    sample_limit: int = flag(2000, "Maximum number of texts to align per file", low=1)
    coverage_floor: float = flag(
        COVERAGE_FLOOR, "Minimum share of the sample's bytes that chunks must cover", low=0, high=1, metavar="SHARE"
    )
    trust_remote_code: bool = flag(False, "Run Python code that comes with a tokenizer")
    fresh: bool = flag(False, "Build again, and replace the bridge in --out")


def run(args: Args) -> None:
    from megatron_tide.bridge import load_tokenizer
    from megatron_tide.bridge.build import build_bridge, summary
    from megatron_tide.bridge.samples import read_samples

    student = load_tokenizer(args.student, mask_token=args.student_mask, trust_remote_code=args.trust_remote_code)
    teacher = load_tokenizer(args.teacher, mask_token=args.teacher_mask, trust_remote_code=args.trust_remote_code)
    texts = read_samples(args.sample, args.sample_limit)
    bridge, built = build_bridge(
        student,
        teacher,
        texts,
        args.out,
        sample_limit=args.sample_limit,
        coverage_floor=args.coverage_floor,
        fresh=args.fresh,
    )
    say(summary(bridge))
    say(f"{args.out}: {'built' if built else 'already done, skipped'}")
