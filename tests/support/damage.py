"""Damage to valid files, drawn from a seed: what broken disks, other programs and attackers leave behind."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VALUES = [
    None,
    True,
    0,
    -1,
    2**31,
    2**70,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a" * 5000,
    "../../etc/passwd",
    "\ud800",
    "\x1b]0;x\x07<b>",
    [],
    {},
    [[]],
    {"a": {}},
    ["x", 1],
    {"\ud800": 1},
]
BYTES = [
    b"",
    b"\n",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 100_000,
    b'{"a": ' * 3000,
    b"null",
    b"[]",
    b"{}",
    b'"x"',
    b"1" * 10_000,
    b"PK\x03\x04",
    b"\x80\x04\x95",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def changed(value: Any, rng: random.Random) -> Any:
    """``value`` with one to three places replaced, removed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(places(value))
        depth = rng.choice(sorted({len(path) for path in found}))  # a long list does not hide what is above it
        path = rng.choice([path for path in found if len(path) == depth])
        if not path:
            return copy.deepcopy(rng.choice(VALUES))
        *above, key = path
        parent = value
        for step in above:
            parent = parent[step]
        action = rng.randrange(4)
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, list):
            parent.append(parent[key])
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def damage(path: Path, rng: random.Random, kinds: int = 10) -> None:
    """Change a JSON value inside the file, or its bytes, or what kind of file it is (``kinds`` 2: no other kind)."""
    raw, kind = path.read_bytes(), rng.randrange(kinds)
    text = path.suffix in (".json", ".jsonl", ".lock")
    if kind == 0 or (not text and kind >= 3):
        _flip(path, raw, rng)
    elif kind == 1:
        path.write_bytes(rng.choice(BYTES))
    elif kind == 2 and kinds > 2:
        path.unlink()
        rng.choice([path.mkdir, lambda: path.symlink_to(path), lambda: os.mkfifo(path), lambda: None])()
    elif path.suffix == ".jsonl":
        lines = raw.decode().splitlines()
        for _ in range(3):
            place = rng.randrange(len(lines))
            with contextlib.suppress(ValueError):
                lines[place] = json.dumps(changed(json.loads(lines[place]), rng))
        path.write_text("\n".join(lines))
    elif text:
        path.write_text(json.dumps(changed(json.loads(raw), rng)))


def _flip(path: Path, raw: bytes, rng: random.Random) -> None:
    """A stretch replaced by random bytes, a few bits flipped, or the end missing; the start of a file more often."""
    start = rng.randrange(min(len(raw), rng.choice([64, 4096, len(raw)])) or 1)
    if rng.randrange(3) == 0:
        path.write_bytes(raw[:start])
    elif rng.randrange(2):
        path.write_bytes(raw[:start] + rng.randbytes(rng.randrange(40)) + raw[start + rng.randrange(400) :])
    else:
        flipped = bytearray(raw)
        for place in [start, *(rng.randrange(len(raw)) for _ in range(rng.randrange(8)))] if raw else []:
            flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)


def restore(path: Path, valid: Path) -> None:
    """Put the undamaged file or folder back."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if valid.is_dir():
        shutil.copytree(valid, path, symlinks=True)
    else:
        shutil.copy2(valid, path)
