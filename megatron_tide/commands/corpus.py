"""Write a corpus from Python's standard library: docstring -> code chats.

Writes train, validation and test files of messages, and a tenth of train. Split by function, the teacher knows the
library that the test is from, and a student trained on a tenth does not. Needs no network. A finished corpus in --out
is kept.

Examples:
  python -m megatron_tide corpus --out runs/mine/corpus
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.choices import CORPUS_SPLITS
from megatron_tide.cli import flag, say


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = flag(..., "Folder to write", metavar="DIR")
    split: str = flag("function", f"What a split keeps together; {CORPUS_SPLITS}", choices=CORPUS_SPLITS)
    fresh: bool = flag(False, "Write the corpus again, even if it exists")


def run(args: Args) -> None:
    import sys
    import sysconfig

    from megatron_tide.data.corpus import write_corpus

    manifest = write_corpus(args.out, Path(sysconfig.get_paths()["stdlib"]), args.split, args.fresh)
    counts = ", ".join(f"{entry['pairs']} in {name}" for name, entry in manifest["files"].items())
    say(f"corpus of Python {manifest['python']}, split by {args.split}, in {args.out}: {counts}", file=sys.stderr)
