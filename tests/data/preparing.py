"""What the tests of preparing share: the command, its flags, and what it leaves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_tide.data import PreparedData
from tests.data.conftest import Pair
from tests.support.commands import command

Chats = Callable[[int], Path]
LENGTHS = ["--student-length", "64", "--teacher-length", "128", "--student-block", "8", "--teacher-block", "16"]
main = command("prepare")
RUN = [sys.executable, "-m", "megatron_tide", "prepare"]


def flags_of(pair: Pair, data: Path, out: Path, *more: str) -> list[str]:
    paths = ["--data", str(data), *pair.flags(), "--out", str(out)]
    return [*paths, *LENGTHS, "--workers", "1", "--shard-rows", "16", *more]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".prepare")}


def prepared(pair: Pair, data: Path, out: Path, *more: str) -> PreparedData:
    assert main(flags_of(pair, data, out, *more)) == 0
    return PreparedData.open(out)


def shards(out: Path) -> int:
    return len(list(out.glob("shard-*")))
