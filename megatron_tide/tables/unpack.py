"""Compressed files of others: how large they become, and unpacked to plain ones."""

from __future__ import annotations

import bz2
import gzip
import importlib
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tide.files import open_regular, replacing
from megatron_tide.tables.arrow import decoded_bytes

_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ARCHIVES = (b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c")
_MORE = {b"\x28\xb5\x2f\xfd": "zstandard", b"\x04\x22\x4d\x18": "lz4.frame"}  # compressed, by packages beside ours
_EXPANDS, _ROOM = 64, 1 << 30  # times the size of a file, and bytes beside that, which it may be unpacked
_PART = 1 << 20  # bytes unpacked at a time
_MEMBERS = 1000  # of an archive
_HIDDEN = re.compile(r"(^|/)(\.|__)[^/]*")  # what systems add to archives, and data sets do not read
ROWS = 64
"""Of a Parquet file at a time: a page may hold one long value, and any number of references to it."""


def check_size(path: Path) -> None:
    """ValueError for an archive, a compressed file or a Parquet file that grows beyond measure when it is read."""
    check = _measure(path, str(path))
    with open_regular(path) as file:
        is_parquet = file.read(4) == b"PAR1"
    if is_parquet:
        from pyarrow import parquet

        with open_regular(path) as raw, parquet.ParquetFile(raw) as table:
            for batch in table.iter_batches(batch_size=ROWS):
                check(sum(map(decoded_bytes, batch)))
    for _, opened in _packed(path, str(path)):
        for part in _parts(opened):
            check(len(part))


def unpacked(path: Path, name: str, kept: Path) -> list[tuple[Path, str]]:
    """The plain files that a file stands for, and their names in messages; what was compressed is under ``kept``.

    Raises:
        ValueError: an archive, or it grows beyond measure; libraries' errors for a corrupt one are any.
    """
    members = _packed(path, name)
    if not members:
        return [(path, name)]
    check, found = _measure(path, name), []
    for number, (member, opened) in enumerate(members):
        plain = kept / str(number)
        if not plain.exists():
            kept.mkdir(parents=True, exist_ok=True)
            with replacing(plain) as (_, descriptor), open(descriptor, "wb", closefd=False) as file:
                for part in _parts(opened):
                    check(len(part))
                    file.write(part)
        found.append((plain, member))
    return found


def _measure(path: Path, name: str) -> Callable[[int], None]:
    """What is called with the size of every part that a file is unpacked to; ValueError where they are too large."""
    most = _ROOM + _EXPANDS * path.stat().st_size

    def check(size: int) -> None:
        nonlocal most
        most -= size
        if most < 0:
            raise ValueError(f"{name}: expands to more than {_EXPANDS} times its size; unpack it, or remove it")

    return check


def _packed(path: Path, name: str) -> list[tuple[str, Callable[[], Any]]]:
    """The name of each file inside a compressed one, and what opens it to be read; nothing for a plain one."""
    with open_regular(path) as file:
        head = file.read(8)
    if head.startswith(_ARCHIVES) or tarfile.is_tarfile(path):
        raise ValueError(f"{name}: an archive; unpack it")
    if zipfile.is_zipfile(path) or head.startswith(b"PK\x03\x04"):
        archive = zipfile.ZipFile(path)
        members = [one for one in archive.infolist() if not one.is_dir() and not _HIDDEN.search(one.filename)]
        if len(members) > _MEMBERS:
            raise ValueError(f"{name}: an archive of {len(members):,} files; unpack it")
        return [(f"{name}/{one.filename}", partial(archive.open, one)) for one in members]
    for start, opened in _COMPRESSED.items():
        if head.startswith(start):
            return [(name, partial(opened, path, "rb"))]
    for start, package in _MORE.items():
        if head.startswith(start):
            try:
                return [(name, partial(importlib.import_module(package).open, path, "rb"))]
            except ImportError:
                raise ValueError(f"{name}: pip install {package.partition('.')[0]} to read it, or unpack it") from None
    return []


def _parts(opened: Callable[[], Any]) -> Iterator[bytes]:
    with opened() as file:
        while part := file.read(_PART):
            yield part
