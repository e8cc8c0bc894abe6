"""Write a corpus from Python's standard library: docstring -> code chats.

Writes train, validation and test files of messages, split by source file, and a tenth of train. Needs no network. A
finished corpus in --out is kept.

Examples:
  python -m megatron_tide corpus --out runs/mine/corpus
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = flag(..., "Folder to write", metavar="DIR")
    fresh: bool = flag(False, "Write the corpus again, even if it exists")


def run(args: Args) -> None:
    import sys
    import sysconfig

    from megatron_tide.data.corpus import write_corpus

    manifest = write_corpus(args.out, Path(sysconfig.get_paths()["stdlib"]), args.fresh)
    counts = ", ".join(f"{entry['pairs']} in {name}" for name, entry in manifest["files"].items())
    say(f"corpus of Python {manifest['python']} in {args.out}: {counts}", file=sys.stderr)
