"""Tables of conversations, read in order or at random: text files here, Parquet and saved data sets by ``datasets``.

Unreadable input raises a one-line ValueError that names file and line; ``data.prepare`` counts such rows.
``datasets`` does not read text files for us: it stops at the first bad row, and requires one type per column.
"""

from __future__ import annotations

import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_tide.files import fingerprint, open_regular, sha256_file
from megatron_tide.hub import hub_errors, may_be_hub_name, one_line
from megatron_tide.tables.arrow import ArrowTable
from megatron_tide.tables.folders import open_folder, open_hub, open_parquet
from megatron_tide.tables.formats import HOPELESS, JsonLines, RowFile

T = TypeVar("T")
UNREADABLE_SHARE = 0.01  # of the rows; a larger share means an error in the data or in the column settings

_KEPT = 1000  # messages that are kept of bad rows; the others are only counted

_HEAD = 100  # first rows, which define the columns of a text file
_KINDS = "a .jsonl or .parquet file, a folder, a hub name (owner/name) or a mixture .json"


def read_rows(path: Path, bad: list[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a JSON Lines file with its place ("file:line"), in order.

    Raises:
        ValueError: a row is not an object; with ``bad``, the row is skipped and the message is appended to ``bad``.
    """
    none_yet = True
    file = RowFile(path, str(path), JsonLines())
    for count, (number, _, line) in enumerate(file.split()):
        try:
            row = file.parse(number, line)
        except ValueError as error:
            if bad is None or (none_yet and count >= HOPELESS):
                raise
            _leave_out(bad, str(error))
            continue
        none_yet = False
        yield f"{path}:{number}", row


def _leave_out(bad: list[str], reason: str) -> None:
    bad.append(reason if len(bad) < _KEPT else "")


def good_rows(
    rows: Iterable[tuple[str, dict[str, Any]]], bad: list[str], read: Callable[[dict[str, Any], str], T]
) -> Iterator[T]:
    """What ``read(row, place)`` makes of each row; why it refuses one (ValueError) goes to ``bad``."""
    for where, row in rows:
        try:
            made = read(row, where)
        except ValueError as error:
            _leave_out(bad, str(error) if str(error).startswith(where) else f"{where}: {error}")
            continue
        yield made


def check_bad(bad: Sequence[str], good: int) -> None:
    """Tell on stderr which rows were left out. ValueError when they are more than ``UNREADABLE_SHARE`` of all."""
    if len(bad) > UNREADABLE_SHARE * (len(bad) + good):
        share = f"{len(bad):,} of {len(bad) + good:,} rows cannot be read, more than {UNREADABLE_SHARE:.0%}"
        raise ValueError(f"{bad[0]}; {share}")
    if bad:
        print(f"rows left out: {len(bad)}, the first: {one_line(bad[0])}", file=sys.stderr)


def _state(about: os.stat_result) -> tuple[int, int]:
    return about.st_size, about.st_mtime_ns


@dataclass(frozen=True)
class TextTable:
    """A text file by row number.

    ``content``: a digest of the rows, for manifests. ``starts``, ``sizes`` int64 [n]: the first byte and the number of
    bytes of each row; ``lines`` int64 [n]: its line from 1. ``columns``: the names in the first rows that can be read.
    ``state``: of the file, which must not change while its rows are read.
    """

    file: RowFile
    content: str
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    lines: NDArray[np.int64]
    columns: list[str]
    state: tuple[int, int]

    @classmethod
    def open(cls, file: RowFile) -> TextTable:
        """Index a file. ValueError when it is none of rows."""
        state = _state(file.path.stat())
        starts, sizes, lines = array("q"), array("q"), array("q")
        columns: dict[str, None] = {}
        readable = 0
        for number, start, raw in file.split():
            if readable < _HEAD:
                try:
                    columns |= dict.fromkeys(file.parse(number, raw))
                    readable += 1
                except ValueError:
                    if not columns and len(starts) >= HOPELESS:
                        raise
            starts.append(start)
            sizes.append(len(raw))
            lines.append(number)
        first, size, line = (np.asarray(values, np.int64) for values in (starts, sizes, lines))
        table = cls(file, sha256_file(file.path), first, size, line, list(columns), state)
        table._check_state(file.path.stat())
        return table

    def __len__(self) -> int:
        return len(self.starts)

    def get(self, row: int) -> dict[str, Any]:
        """The row as column -> value; ValueError when it cannot be read, OSError when the file has changed."""
        with open_regular(self.file.path) as opened:
            self._check_state(os.fstat(opened.fileno()))
            opened.seek(int(self.starts[row]))
            return self.file.parse(int(self.lines[row]), opened.read(int(self.sizes[row])))

    def _check_state(self, now: os.stat_result) -> None:
        if _state(now) != self.state:
            raise OSError(f"{self.file.name}: changed while it was read; start again")

    def where(self, row: int) -> str:
        """Where the row is, for error messages."""
        return f"{self.file.name}:{self.lines[row]}"

    def has(self, column: str) -> bool:
        """Whether a row, also a later one, has the column."""
        return any(values is not None and values[0] is not None for values in self.scan([column]))

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | None]:
        """The values of these columns, row after row; None for a row that cannot be read."""
        for number, _, raw in self.file.split():
            try:
                row = self.file.parse(number, raw)
            except ValueError:
                yield None
            else:
                yield tuple(row.get(column) for column in columns)


@dataclass(frozen=True)
class JoinedTable:
    """Files of one data set, one after the other, as one table; each may have columns that others lack."""

    parts: tuple[TextTable | ArrowTable, ...]
    content: str

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for part in self.parts for name in part.columns))

    def __len__(self) -> int:
        return self._ends[-1]

    def get(self, row: int) -> dict[str, Any]:
        part, row = self._place(row)
        return part.get(row)

    def where(self, row: int) -> str:
        part, row = self._place(row)
        return part.where(row)

    def has(self, column: str) -> bool:
        return any(part.has(column) for part in self.parts)

    def only(self, columns: Container[str]) -> JoinedTable:
        parts = (part.only(columns) if isinstance(part, ArrowTable) else part for part in self.parts)
        return replace(self, parts=tuple(parts))

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | None]:
        for part in self.parts:
            yield from part.scan(columns)

    def _place(self, row: int) -> tuple[TextTable | ArrowTable, int]:
        number = bisect_right(self._ends, row)
        return self.parts[number], row - (self._ends[number] - len(self.parts[number]))

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))


Table = TextTable | ArrowTable | JoinedTable


def open_table(path: str, folder: Path, *, name: str | None, split: str, revision: str | None) -> Table:
    """Open a file, a folder or a hub name; ValueError in one line for what cannot be read as a table.

    For a folder with a file SPLIT.jsonl, that file is read; ``datasets`` finds the files of all other folders.
    """
    found = next((p for p in (folder / path, Path(path)) if p.exists()), None)
    if found is not None and (found / f"{split}.jsonl").is_file():
        return _json_lines(found / f"{split}.jsonl")
    if found is None and not may_be_hub_name(path, owner=False):
        raise ValueError(f"{path}: no such file or folder; use {_KINDS}")
    if found is not None and found.is_file() and found.suffix == ".jsonl":
        return _json_lines(found)
    if found is not None and found.is_file() and found.suffix != ".parquet":
        raise ValueError(f"{found}: unknown file type; use {_KINDS}")
    what = f"{found or path}: cannot be read as a data set, split {split!r}"
    with hub_errors(what, Exception):  # whatever the library makes of a folder
        if found is None:
            table = open_hub(path, name, split, revision)
            if not isinstance(table, list):
                return ArrowTable(table, f"{path} {name or ''} {split}", table._fingerprint)
            texts = tuple(map(TextTable.open, table))
            return _readable(JoinedTable(texts, fingerprint([text.content for text in texts])))
        if found.is_file():
            return _parquet(found)
        table, content = open_folder(found, name, split)
    if not isinstance(table, list):
        return ArrowTable(table, str(found), content)
    parts = tuple(TextTable.open(one) if isinstance(one, RowFile) else _parquet(one) for one in table)
    return _readable(JoinedTable(parts, content))


def _json_lines(path: Path) -> Table:
    return _readable(TextTable.open(RowFile(path, str(path), JsonLines())))


def _readable(table: Table) -> Table:
    """``table``; ValueError where it has rows, none of which can be read."""
    if not table.columns and len(table):
        table.get(0)
    return table


def _parquet(path: Path) -> ArrowTable:
    with hub_errors(f"{path}: cannot be read as a data set", Exception):
        table, content = open_parquet(path)
    return ArrowTable(table, str(path), content)
