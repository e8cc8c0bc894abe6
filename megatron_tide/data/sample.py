"""A fair sample of any data set or mixture as a JSONL file of ``messages``: what a bridge is measured on.

The bridge reads files only; this is how a hub name or a mixture becomes one. The same data give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from megatron_tide import cli
from megatron_tide.data.sources import check_unreadable, open_mixture
from megatron_tide.files import atomic_write


def main(argv: list[str]) -> int:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_tide.data.sample",
        description="Write some conversations of a data set or mixture, chosen over all of it, as one JSONL file. "
        "python -m megatron_tide.bridge --sample FILE measures coverage on it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", nargs="+", required=True, metavar="DATA", help="mixture .json, .jsonl, .parquet, folder or hub name")
    add("--out", type=Path, required=True, metavar="FILE", help="the .jsonl file to write")
    add("--limit", type=int, default=2000, metavar="N", help="how many conversations")
    arguments = parser.parse_args(argv)
    if arguments.limit < 1:
        raise ValueError(f"--limit is {arguments.limit}; it must be at least 1")
    if arguments.out.suffix != ".jsonl":
        raise ValueError(f"{arguments.out}: the file to write must end in .jsonl")
    mixture = open_mixture(arguments.data).limited(arguments.limit)
    unreadable = [position for position in range(len(mixture)) if mixture.error(position)]
    check_unreadable(mixture, len(unreadable), unreadable)
    kept = sorted(set(range(len(mixture))) - set(unreadable))
    rows = [{"id": int(mixture.key[n]), "messages": mixture.conversation(n)[1]} for n in kept]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if arguments.out.exists() and arguments.out.read_bytes() != content:
        raise ValueError(f"{arguments.out}: exists and holds something else; remove it, or take another --out")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(arguments.out, content)
    print(f"wrote {len(rows):,} conversations to {arguments.out}", file=sys.stderr)
    for position in unreadable[:5]:
        print(f"left out: {mixture.error(position)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
