"""One shard of a prepared folder: a safetensors file of flat arrays, written whole and read through a memory map.

Arrays of a shard of n samples (S and T are the shard's student and teacher tokens in total):

====================  ======  =======  ======================================================================
name                  dtype   shape    meaning
====================  ======  =======  ======================================================================
student_ids           int32   [S]      tokens of all samples, one sample after the other
student_chunk         int32   [S]      chunk of each token; ``PROMPT`` or ``UNALIGNED`` where it has none
student_offsets       int64   [n+1]    where each sample starts in student_ids
student_prompt        int32   [n]      number of prompt tokens
student_content_end   int32   [n]      the last scored position: the first EOS, or a cut response's last token
teacher_...                            the same for the teacher; [0] and zeros in one-sided data
chunks                int32   [n]      number of chunks, the end chunk included
response_bytes        int32   [n]      UTF-8 bytes of the response that the student tokens spell
key                   int64   [n]      the sample's name for everything that is random
====================  ======  =======  ======================================================================
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from megatron_tide.files import atomic_write, canonical

PROMPT = -1
UNALIGNED = -2

Array = NDArray[Any]
SIDES = ("student", "teacher")
_PER_TOKEN = ("ids", "chunk")
_PER_SAMPLE = ("prompt", "content_end")
_COMMON = ("chunks", "response_bytes")
_METADATA = "tide"  # one key only: safetensors writes several in an order that differs from run to run
_DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


@dataclass(frozen=True, kw_only=True)
class TokenizedSample:
    """One side of a sample: ``ids`` and ``chunk`` int32 [length], ``prompt`` tokens, ``content_end`` (inclusive)."""

    ids: NDArray[np.int32]
    chunk: NDArray[np.int32]
    prompt: int
    content_end: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A conversation as both models read it. ``teacher`` is None in one-sided data (which has no chunks)."""

    key: int
    student: TokenizedSample
    teacher: TokenizedSample | None
    chunks: int
    response_bytes: int


def shard_name(number: int) -> str:
    """The file name of shard ``number``."""
    return f"shard-{number:05d}.safetensors"


def pack(samples: list[Sample]) -> dict[str, Array]:
    """The arrays of a shard (see the module's table) from its samples, in order."""
    arrays: dict[str, Array] = {
        "chunks": np.array([s.chunks for s in samples], np.int32),
        "response_bytes": np.array([s.response_bytes for s in samples], np.int32),
        "key": np.array([s.key for s in samples], np.int64),
    }
    empty = TokenizedSample(ids=np.zeros(0, np.int32), chunk=np.zeros(0, np.int32), prompt=0, content_end=0)
    for name in SIDES:
        sides = [getattr(s, name) or empty for s in samples]
        for field in _PER_TOKEN:
            parts = [np.asarray(getattr(side, field), np.int32) for side in sides]
            arrays[f"{name}_{field}"] = np.concatenate([np.zeros(0, np.int32), *parts])
        lengths = np.array([len(side.ids) for side in sides], np.int64)
        arrays[f"{name}_offsets"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        for field in _PER_SAMPLE:
            arrays[f"{name}_{field}"] = np.array([getattr(side, field) for side in sides], np.int32)
    return arrays


def _payload_digest(arrays: dict[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def write_shard(path: Path, samples: list[Sample], record: dict[str, Any]) -> None:
    """Write a shard atomically. ``record`` (JSON) says what it was made from; equal input gives equal bytes."""
    arrays = pack(samples)
    note = canonical({"record": record, "payload": _payload_digest(arrays)}).decode()
    atomic_write(path, save(arrays, metadata={_METADATA: note}))


@dataclass(frozen=True)
class ShardFile:
    """Where the arrays of one shard lie in its file; ``open`` maps them. ``rows`` samples."""

    path: Path
    rows: int
    record: dict[str, Any]
    payload: str
    layout: dict[str, tuple[np.dtype[Any], int, int]]

    def open(self) -> dict[str, Array]:
        """Memory-map the file: name -> array. Nothing is read before it is touched."""
        mapped = np.memmap(self.path, np.uint8, mode="r")
        return {
            name: np.asarray(mapped[start : start + count * dtype.itemsize]).view(dtype)
            for name, (dtype, start, count) in self.layout.items()
        }

    def intact(self) -> bool:
        """Whether the arrays are the ones that were written (reads the whole file)."""
        return _payload_digest(self.open()) == self.payload


def read_header(path: Path) -> ShardFile:
    """Parse a shard's header and check the file against it: every array there, of its type and length, no byte missing.

    Raises ValueError naming the file when it is missing, empty, truncated, or no shard.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(length) if 0 < length < size else b""
    except FileNotFoundError:
        raise ValueError(f"{path}: the shard is missing; prepare the data again (finished shards are kept)") from None
    if size == 0:
        raise ValueError(f"{path}: the shard is empty; prepare the data again (finished shards are kept)")
    try:
        return _parse(path, json.loads(head), 8 + length, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path}: truncated or not a shard ({reason}); prepare the data again") from None


def _parse(path: Path, header: dict[str, Any], start: int, size: int) -> ShardFile:
    note = json.loads(header.pop("__metadata__")[_METADATA])
    layout: dict[str, tuple[np.dtype[Any], int, int]] = {}
    end = start
    for name, entry in header.items():
        dtype = _DTYPES[entry["dtype"]]
        first, last = entry["data_offsets"]
        (count,) = entry["shape"]
        if first < 0 or last - first != count * dtype.itemsize:
            raise ValueError(f"array {name} has the wrong length")
        layout[name] = (dtype, start + first, count)
        end = max(end, start + last)
    if end != size:
        raise ValueError(f"{size} bytes, its header says {end}")
    rows = layout["key"][2]
    _expect(layout, rows)
    return ShardFile(path=path, rows=rows, record=note["record"], payload=note["payload"], layout=layout)


def _expect(layout: dict[str, tuple[np.dtype[Any], int, int]], rows: int) -> None:
    expected = dict.fromkeys(_COMMON, (_DTYPES["I32"], rows)) | {"key": (_DTYPES["I64"], rows)}
    for side in SIDES:
        tokens = layout[f"{side}_ids"][2]
        expected |= {f"{side}_{field}": (_DTYPES["I32"], tokens) for field in _PER_TOKEN}
        expected |= {f"{side}_{field}": (_DTYPES["I32"], rows) for field in _PER_SAMPLE}
        expected[f"{side}_offsets"] = (_DTYPES["I64"], rows + 1)
    found = {name: (dtype, count) for name, (dtype, _, count) in layout.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(f"arrays {', '.join(wrong)} are missing, unknown, or of the wrong type or length")
