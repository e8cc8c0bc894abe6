"""Compressed files of others: how large they become, and unpacked to plain ones."""

from __future__ import annotations

import bz2
import contextlib
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

from megatron_tide.files import atomic_write, open_regular, read_whole, replacing, sha256_file
from megatron_tide.hub import one_line
from megatron_tide.tables.arrow import decoded_bytes

_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_ARCHIVES = (b"Rar!\x1a\x07", b"7z\xbc\xaf\x27\x1c")
_MORE = {b"\x28\xb5\x2f\xfd": "zstandard", b"\x04\x22\x4d\x18": "lz4.frame"}  # compressed, by packages beside ours
_EXPANDS, _ROOM = 64, 1 << 30  # times the size of a file, and bytes beside that, which it may be unpacked
_PART, _FRAME_PART = 1 << 20, 1 << 12  # bytes unpacked at a time; packed ones, of which each may become 30,000
_BLOCK = 512  # bytes of a header of ``tar``
_MEMBERS = 1000  # of an archive
_HIDDEN = re.compile(r"(^|/)(\.[^./]|__)")  # what systems add to archives, and data sets do not read
ROWS = 64
"""Of a Parquet file at a time: a page may hold one long value, and any number of references to it."""
Parts = Callable[[], Iterator[bytes]]
"""Reads an unpacked file, part by part."""


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
    for member, parts in _packed(path, str(path)) or ():
        for part in _told(member, parts()):
            check(len(part))


def unpacked(path: Path, name: str, kept: Path) -> list[tuple[Path, str]]:
    """The plain files that a file stands for, and their names in messages; what was compressed is under ``kept``.

    Raises:
        ValueError: an archive, corrupt, or it grows beyond measure; ``zipfile``'s for what is no archive of its own.
    """
    members = _packed(path, name)
    if members is None:
        return [(path, name)]
    check, found = _measure(path, name), []
    for number, (member, parts) in enumerate(members):
        plain, digest = kept / str(number), kept / f"{number}.sha256"
        if not (digest.exists() and plain.exists() and read_whole(digest) == sha256_file(plain).encode()):
            kept.mkdir(parents=True, exist_ok=True)
            with replacing(plain) as (_, descriptor), open(descriptor, "wb", closefd=False) as file:
                for part in _told(member, parts()):
                    check(len(part))
                    file.write(part)
            atomic_write(digest, sha256_file(plain).encode())
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


def _packed(path: Path, name: str) -> list[tuple[str, Parts]] | None:
    """The name of each file inside a compressed one, and what reads it; None for a plain one."""
    with open_regular(path) as file:
        head = file.read(_BLOCK)
    if head.startswith(_ARCHIVES):
        raise ValueError(f"{name}: an archive; unpack it")
    _refuse_tar(head, name)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        archive = zipfile.ZipFile(path)
        members = [one for one in archive.infolist() if not one.is_dir() and not _HIDDEN.search(one.filename)]
        kinds = {Path(one.filename).suffix.lower() for one in members}
        if len(members) > _MEMBERS or len(kinds) != 1:
            has = (
                f"{len(members):,} files" if len(kinds) < 2 else f"files of several kinds ({', '.join(sorted(kinds))})"
            )
            raise ValueError(f"{name}: an archive of {has}; unpack it")
        return [(f"{name}/{one_line(one.filename)}", partial(_parts, archive.open, one)) for one in members]
    for start, opened in _COMPRESSED.items():
        if head.startswith(start):
            return [(name, partial(_parts, opened, path, "rb"))]
    for start, package in _MORE.items():
        if head.startswith(start):
            try:
                module = importlib.import_module(package)
            except ImportError:
                raise ValueError(f"{name}: pip install {package.partition('.')[0]} to read it, or unpack it") from None
            zstd = package == "zstandard"
            return [(name, partial(_frames, path, module) if zstd else partial(_parts, module.open, path))]
    return None


def _refuse_tar(start: bytes, name: str) -> None:
    """ValueError for the start of an archive that ``tar`` made. The module's own test would read as much of it as it
    says."""
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(start[:_BLOCK], "utf-8", "surrogateescape")
        raise ValueError(f"{name}: an archive; unpack it")


def _told(name: str, parts: Iterator[bytes]) -> Iterator[bytes]:
    """``parts``; ValueError where they are an archive, or cannot be read."""
    try:
        for number, part in enumerate(parts):
            if not number:
                _refuse_tar(part, name)
            yield part
    except ValueError:
        raise
    except Exception as error:  # of any library
        raise ValueError(f"{name}: cannot be unpacked ({error}); restore it") from None


def _parts(opened: Callable[..., Any], *what: Any) -> Iterator[bytes]:
    with opened(*what) as file:
        while part := file.read(_PART):
            yield part


def _frames(path: Path, zstandard: Any) -> Iterator[bytes]:
    """``_parts`` of all frames of a Zstandard file, whose own readers take one that is cut off for a whole one."""
    with open_regular(path) as file:
        frame = None
        while part := file.read(_FRAME_PART):
            while part:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(part)
                part, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise EOFError("cut off")
