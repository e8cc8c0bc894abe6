"""A fair sample of any data set or mixture as a JSONL file of ``messages``: what a bridge is measured on.

The bridge reads files only; this is how a hub name or a mixture becomes one. The same data give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_tide.data.sources import check_unreadable, open_mixture
from megatron_tide.files import atomic_write


def write_sample(data: Sequence[str], out: Path, limit: int) -> tuple[int, list[str]]:
    """Write ``limit`` conversations of ``data`` (mixtures, files, hub names); -> (how many, why others are left out).

    Raises:
        ValueError: ``out`` is no .jsonl file, or holds something else.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"{out}: the file to write must end in .jsonl")
    mixture = open_mixture(data).limited(limit)
    unreadable = [position for position in range(len(mixture)) if mixture.error(position)]
    check_unreadable(mixture, len(unreadable), unreadable)
    kept = sorted(set(range(len(mixture))) - set(unreadable))
    rows = [{"id": int(mixture.key[n]), "messages": mixture.conversation(n)[1]} for n in kept]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if out.exists() and out.read_bytes() != content:
        raise ValueError(f"{out}: exists and holds something else; remove it, or take another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, content)
    return len(rows), [mixture.error(position) or "" for position in unreadable]
