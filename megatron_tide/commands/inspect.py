"""Show in colour how the tokens of two tokenizers are aligned in chunks.

For a text, or for the first texts of a file, prints the student's tokens, then the teacher's. A chunk has the same
colour on both sides; a bar separates its tokens. Tokens outside every chunk are red. Without colour, chunks are in
brackets and other tokens between ~.

Examples:
  python -m megatron_tide inspect "def add(a, b):" --student runs/quickstart/student --teacher runs/quickstart/teacher
  python -m megatron_tide inspect --data texts.jsonl --limit 1 --student Qwen/Qwen3-0.6B --teacher tokenizer.model
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say
from megatron_tide.commands import refuse_unused


@dataclass(frozen=True, kw_only=True)
class Args:
    text: str | None = flag(None, "Text to align; or give --data", kind="positional")
    data: Path | None = flag(
        None, "File of texts to align: JSONL or Parquet with messages or text, or plain text", metavar="FILE"
    )
    student: str = flag(..., "Tokenizer of the student: folder, hub name, .model or .tiktoken", metavar="TOKENIZER")
    teacher: str = flag(..., "Tokenizer of the teacher, in the same forms", metavar="TOKENIZER")
    limit: int = flag(3, "Number of texts to show from --data", low=1)
    no_color: bool = flag(
        False, "Mark chunks with brackets instead of colours (also if NO_COLOR is set or output is a pipe)"
    )
    trust_remote_code: bool = flag(False, "Run Python code that comes with a tokenizer")


def run(args: Args) -> None:
    if (args.text is None) == (args.data is None):
        raise ValueError("use either a text or --data, not both")
    if args.data is None:
        refuse_unused(args, "--data", ["limit"])
    import os
    import sys

    from megatron_tide.bridge import Bridge, align_text, load_tokenizer
    from megatron_tide.bridge.build import summary
    from megatron_tide.bridge.samples import read_samples
    from megatron_tide.bridge.show import show
    from megatron_tide.screen import plain

    texts = [args.text] if args.text is not None else read_samples([args.data], args.limit) if args.data else []
    student = load_tokenizer(args.student, trust_remote_code=args.trust_remote_code)
    teacher = load_tokenizer(args.teacher, trust_remote_code=args.trust_remote_code)
    colour = not args.no_color and not os.environ.get("NO_COLOR") and sys.stdout.isatty()
    for text in texts:
        print(show(student, teacher, align_text(student, teacher, text), colour), end="\n\n", file=plain(sys.stdout))
    say(summary(Bridge.build(student, teacher, texts)))
