"""Arrow files of others, checked before anything else reads them: readers trust what a file says of its own sizes."""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_tide.files import open_regular

BROKEN = (pa.ArrowException, ValueError, LookupError, TypeError, OSError, StopIteration, struct.error, RecursionError)
"""What reading a corrupt file can raise, besides ArrowInvalid (a ValueError)."""
_AT_ONCE = 1 << 30  # bytes of values that are decoded at once
_SCAN = 1000  # rows decoded at a time while a filter reads columns


def next_message(messages: pa.ipc.MessageReader, *kinds: str) -> pa.ipc.Message:
    """ValueError for a message of none of ``kinds``: pyarrow reads it as one of them, and crashes."""
    message = messages.read_next_message()
    if message.type not in kinds:
        raise ValueError(f"no {kinds[0]}")
    if message.type != "schema" and _is_compressed(message.metadata.to_pybytes(), message.type == "dictionary"):
        raise ValueError("compressed")  # decompression would trust the sizes that it declares
    return message


def check_stream(path: Path) -> None:
    """Read an Arrow stream, or file, as a whole: every value is inside its column, every text is UTF-8.

    Raises:
        ValueError: names the file; it is corrupt, or compressed. OSError: it is no regular file.
    """
    open_regular(path).close()  # the library would wait for a FIFO's writer
    try:
        with pa.memory_map(str(path)) as source:
            start = 8 if source.read(6) == b"ARROW1" else 0  # a file's stream is behind its magic
            source.seek(start)
            messages = pa.ipc.MessageReader.open_stream(source)
            next_message(messages, "schema")
            try:
                while True:
                    next_message(messages, "record batch", "dictionary")
            except StopIteration:
                pass
            source.seek(start)
            for batch in pa.ipc.open_stream(source):
                batch.validate(full=True)
    except BROKEN as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{path}: corrupt, or no Arrow file that can be read ({reason}); restore it") from None


def _is_compressed(metadata: bytes, is_dictionary: bool) -> bool:
    """Whether a message of columns has a compression, read from its flatbuffer (pyarrow does not expose it)."""

    def field(table: int, number: int) -> int:
        (back,) = struct.unpack_from("<i", metadata, table)
        (size,) = struct.unpack_from("<H", metadata, table - back)
        place = 4 + 2 * number
        return table + struct.unpack_from("<H", metadata, table - back + place)[0] if place < size else table

    def inner(table: int, number: int) -> int:
        place = field(table, number)
        return place + int(struct.unpack_from("<I", metadata, place)[0])

    (message,) = struct.unpack_from("<I", metadata, 0)
    batch = inner(message, 2)
    batch = inner(batch, 1) if is_dictionary else batch
    return field(batch, 3) != batch


def read_saved(paths: list[Path]) -> Any:
    """A data set of ``datasets`` over checked Arrow streams, memory-mapped; their schema's own notes are not read.

    Raises:
        ValueError: names a file that is corrupt, or has other columns than the first.
    """
    from datasets import Dataset, table

    for path in paths:
        check_stream(path)
    try:
        parts = [table.MemoryMappedTable.from_file(str(path)).replace_schema_metadata(None) for path in paths]
        if any(part.schema != parts[0].schema for part in parts):
            raise ValueError("their columns differ")
        return Dataset(table.concat_tables(parts))
    except BROKEN as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{paths[0].parent}: its .arrow files are not of one data set ({reason})") from None


def values(table: Any, columns: Sequence[str], start: int, stop: int) -> Iterator[tuple[Any, ...] | None]:
    """The rows from ``start`` to ``stop``, each alone where one of them cannot be read (None for that one), or they are
    large."""
    try:
        if stop - start > 1 and sum(_bytes(table.data[column], stop - start) for column in columns) > _AT_ONCE:
            raise ValueError("large")
        batch = table[start:stop]
    except (ValueError, ArithmeticError):
        if stop - start == 1:
            yield None
            return
        for row in range(start, stop):
            yield from values(table, columns, row, row + 1)
        return
    yield from zip(*(batch[column] for column in columns))


def decoded_bytes(array: pa.Array) -> int:
    """The size of an array whose dictionaries, also those inside it, are replaced by their values."""
    if isinstance(array, pa.DictionaryArray):
        return decoded_bytes(array.dictionary_decode())
    if isinstance(array, pa.StructArray | pa.ListArray | pa.LargeListArray):
        inner = array.flatten()
        return sum(map(decoded_bytes, inner if isinstance(inner, list) else [inner]))
    return int(array.nbytes)


def _bytes(column: pa.ChunkedArray, rows: int) -> int:
    """What this many rows of a column may take: a dictionary's may all be its longest value."""
    chunks = [chunk for chunk in column.chunks if isinstance(chunk, pa.DictionaryArray)]
    return rows * max((chunk.dictionary.nbytes for chunk in chunks), default=0)


def kept_by(content: str) -> str:
    """Where ``datasets`` keeps what it made of files of this content: its own keys hold their times, which two versions
    of a file may share (out of an archive, or copied with them)."""
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / "by-content" / content[:32])


@dataclass(frozen=True)
class ArrowTable:
    """A table of the ``datasets`` library, like ``TextTable``: memory-mapped, and small to send to a worker."""

    table: Any
    label: str
    content: str

    @property
    def columns(self) -> list[str]:
        return list(self.table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def get(self, row: int) -> dict[str, Any]:
        try:
            return {column: _dense(value) for column, value in self.table[row].items()}
        except (ValueError, ArithmeticError) as error:  # no UTF-8; a time outside of what Python's can hold
            raise ValueError(f"{self.where(row)}: cannot be read ({error})") from None

    def where(self, row: int) -> str:
        return f"{self.label} row {row}"

    def has(self, column: str) -> bool:
        return column in self.columns

    def only(self, columns: Container[str]) -> ArrowTable:
        """The table with those of its columns that are in ``columns``."""
        kept = [name for name in self.columns if name in columns] or self.columns[:1]  # a table of none has no rows
        return replace(self, table=self.table.select_columns(kept))

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | None]:
        own = [name for name in columns if self.has(name)]
        if not own:
            yield from [(None,) * len(columns)] * len(self)
            return
        table = self.table.select_columns(own)
        for start in range(0, len(table), _SCAN):
            for row in values(table, own, start, min(start + _SCAN, len(table))):
                yield row if row is None or len(own) == len(columns) else tuple(map(dict(zip(own, row)).get, columns))


def _dense(value: Any) -> Any:
    """``value`` without the keys that hold nothing: Arrow gives every object of a column the keys of all of them."""
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items() if item is not None}
    return [_dense(item) for item in value] if isinstance(value, list) else value
