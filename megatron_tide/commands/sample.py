"""Write a sample of a data set or mixture as one JSONL file, to measure a bridge on.

The conversations are evenly spaced over the data. The bridge command reads only files; this command writes a file from
a hub data set or a mixture. The same data give the same bytes.

Examples:
  python -m megatron_tide sample --data recipes/mixtures/paper.json --out runs/mine/sample.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_tide.cli import flag, say


@dataclass(frozen=True, kw_only=True)
class Args:
    data: tuple[str, ...] = flag(..., "Data: mixture .json, .jsonl, .parquet, folder or hub name", metavar="DATA")
    out: Path = flag(..., "JSONL file to write", metavar="FILE")
    limit: int = flag(2000, "Number of conversations to write", low=1)


def run(args: Args) -> None:
    import sys

    from megatron_tide.data.sources import write_sample

    count, skipped = write_sample(args.data, args.out, args.limit)
    say(f"wrote {count:,} conversations to {args.out}", file=sys.stderr)
    for reason in skipped[:5]:
        say(f"skipped: {reason}", file=sys.stderr)
