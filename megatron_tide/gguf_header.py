"""The header of a GGUF file (versions 2 and 3, little endian), read with every size checked against the file's own.

llama.cpp ends the process, or reads behind its memory, for some headers that no converter writes: what passes here and
in ``megatron_tide.models.gguf_release`` is a file that it can be given. Tensors stay on the disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from megatron_tide.bounds import MERGED_BYTES
from megatron_tide.files import open_regular

MAGIC = b"GGUF"
MOST_KEYS, MOST_TENSORS, LONGEST_KEY = 1 << 12, 1 << 16, 1 << 10
LONGEST_VALUE = 1 << 28  # bytes: a file with holes has no need of the disk to be as long as it says
MOST_ITEMS = 1 << 22  # of all lists together (of the largest public vocabulary, 2^20)
KEPT = 1 << 10  # of a longer list only the length is kept
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, LIST = 8, 9
# Tensor type -> values in a block, bytes of a block.
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34)}
BLOCKS |= {10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 20: (32, 18), 23: (256, 136)}
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 30


@dataclass(frozen=True)
class Stored:
    """One tensor: ``shape`` as torch has it (rows before columns), its type's number, bytes on the disk."""

    shape: tuple[int, ...]
    kind: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """``values``: text, numbers, and lists of up to ``KEPT`` numbers; of other lists their length."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Stored]

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """``values[key]``. ValueError where it has another type, or is missing without a ``default``."""
        found = self.values.get(key, default)
        if type(found) is not kind:
            what = "missing" if found is None else f"a {type(found).__name__}, not a {kind.__name__}"
            raise ValueError(f"{self.path}: {key} is {what}; write it with convert-gguf")
        return found


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises:
        ValueError: no GGUF file, or one that is corrupt, cut off, or not of sizes that models have.
        OSError: the disk, or not a regular file.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    with _opened(path) as reader:
        return _read(path, reader)


def check_lists(path: Path) -> None:
    """The errors of ``read_header`` for a file of others whose lists would take all memory in libraries: of too many
    items, or of tokens of which too many begin with others.
    """
    with _opened(path) as reader:
        _keys(reader)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Reader]:
    with open_regular(path) as file:
        try:
            yield _Reader(file)
        except (_DamagedError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a GGUF file that can be used ({error}); write it again") from None


class _DamagedError(Exception):
    pass


class _Reader:
    def __init__(self, file: BufferedReader) -> None:
        self._file, self.size, self.place = file, os.fstat(file.fileno()).st_size, 0
        self._items = 0

    def take(self, count: int) -> bytes:
        if count > LONGEST_VALUE:
            raise _DamagedError(f"a value of {count} bytes")
        if count > self.size - self.place:
            raise _DamagedError(f"it ends in its header, at byte {self.size}")
        self.place += count
        return self._file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, what: str, most: int, code: str = "Q") -> int:
        found = self.number(code)
        if found > most:
            raise _DamagedError(f"{found} {what}, of which none has more than {most}")
        return found

    def text(self, most: int) -> str:
        return self.take(self.count("bytes of a text", most)).decode("utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text(self.size)
        if kind == LIST:
            return self.items()
        if kind not in SCALARS:
            raise _DamagedError(f"a value of type {kind}")
        return self.number(SCALARS[kind])

    def items(self) -> Any:
        kind, count = self.number("I"), self.count("items of a list", self.size)
        self._items += count
        if self._items > MOST_ITEMS:
            raise _DamagedError(f"{self._items} items in its lists, which have at most {MOST_ITEMS}")
        if kind == STRING:
            halves = 0  # bytes of all ways to cut each text in two
            for _ in range(count):
                halves += len(self.take(self.count("bytes of a text", self.size))) ** 2
                if halves > MERGED_BYTES:
                    raise _DamagedError("a list with longer texts than those of tokens")
            return count
        if kind not in SCALARS:
            raise _DamagedError(f"a list of type {kind}")
        data = self.take(count * struct.calcsize(f"<{SCALARS[kind]}"))
        return list(struct.unpack(f"<{count}{SCALARS[kind]}", data)) if count <= KEPT else count


def _read(path: Path, reader: _Reader) -> GgufHeader:
    tensors, values = _keys(reader)
    align = values.get("general.alignment", 32)
    if type(align) is not int or align not in {1 << power for power in range(3, 13)}:
        raise _DamagedError(f"an alignment of {str(align)[:20]}")
    found: dict[str, tuple[Stored, int]] = {}
    for _ in range(tensors):
        name = reader.text(LONGEST_KEY)
        if name in found:
            raise _DamagedError(f"tensor {name!r} twice")
        found[name] = _tensor(name, reader)
    begin = -(-reader.place // align) * align
    for name, (stored, offset) in found.items():
        if offset % align or begin + offset + stored.size > reader.size:
            raise _DamagedError(f"tensor {name!r} lies outside the file's {reader.size} bytes")
    return GgufHeader(path, values, {name: stored for name, (stored, _) in found.items()})


def _keys(reader: _Reader) -> tuple[int, dict[str, Any]]:
    """The number of tensors, and the values."""
    if reader.take(4) != MAGIC or reader.number("I") not in (2, 3):
        raise _DamagedError("it does not begin as one of version 2 or 3")
    tensors, keys = reader.count("tensors", MOST_TENSORS), reader.count("keys", MOST_KEYS)
    values: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.text(LONGEST_KEY)
        if key in values:
            raise _DamagedError(f"{key!r} twice")
        values[key] = reader.value()
    return tensors, values


def _tensor(name: str, reader: _Reader) -> tuple[Stored, int]:
    sizes = [reader.count(f"values along an axis of {name!r}", 1 << 40) for _ in range(reader.count("axes", 4, "I"))]
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in BLOCKS:
        raise _DamagedError(f"tensor {name!r} has the type {kind}, which is not supported")
    block, size = BLOCKS[kind]
    if not sizes or min(sizes) < 1 or sizes[0] % block:
        raise _DamagedError(f"tensor {name!r} has the shape {sizes}, which its type cannot have")
    return Stored(tuple(reversed(sizes)), kind, math.prod(sizes) // block * size), offset
