"""Text files of rows, as JSON Lines, one JSON list or CSV: where each row is, and what it says.

A bad row is one row: it is found like the others, and refused only when it is read.
"""

from __future__ import annotations

import contextlib
import csv
import json
import mmap
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from megatron_tide.files import open_regular

ROW_BYTES = 1 << 24
"""Bytes of one row; a longer one is a bad row, of which no more is read."""
HOPELESS = 1 << 17
"""Rows at the head of a file: where none of them can be read, it is no file of rows, and is not read further."""
_LONGEST = 1 << 30  # bytes of a row: there, too, a file is not read further
_HEAD = 100  # rows that tell JSON Lines from another text
_BOM = b"\xef\xbb\xbf"
_LINES_NAMED = (".jsonl", ".ndjson")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["\[\]{},]', re.DOTALL)  # of JSON, what tells where an item ends
_SPACE = re.compile(rb"[ \t\r\n]*+")

Row = tuple[int, int, bytes]
"""Line from 1, first byte, and bytes of a row: all of them up to ``ROW_BYTES``, or more than that many."""


class RowFormat(Protocol):
    """How a text file holds its rows; ``name`` and ``where`` are for messages."""

    def split(self, path: Path, name: str) -> Iterator[Row]:
        """The rows in order. ValueError for a file that is not of this format at all."""

    def parse(self, raw: bytes, where: str) -> dict[str, Any]:
        """A row's columns and their values; ValueError for a bad one."""


@dataclass(frozen=True)
class RowFile:
    """A text file of rows; ``name``: what messages call it, where it was unpacked from another."""

    path: Path
    name: str
    format: RowFormat

    def split(self) -> Iterator[Row]:
        return self.format.split(self.path, self.name)

    def parse(self, line: int, raw: bytes) -> dict[str, Any]:
        """The row of that line, from its bytes; ValueError naming both for a bad one."""
        return self.format.parse(raw, f"{self.name}:{line}")


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object of UTF-8; ValueError, one line naming ``where``, for anything else."""
    text = _text(raw, where)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); fix or remove the line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}, not an object; fix or remove the line")
    return row


def _text(raw: bytes, where: str) -> str:
    if len(raw) > ROW_BYTES:
        raise ValueError(f"{where}: a row of more than {ROW_BYTES:,} bytes; cut or remove it")
    try:
        # Half surrogate pairs pass here; the tokenizer accepts or rejects them.
        return raw.removeprefix(_BOM).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (at byte {error.start}); fix or remove the line") from None


def _lines(path: Path, name: str) -> Iterator[Row]:
    """Every line, with its line feed; of one that is too long, its start."""
    number = position = 0
    with open_regular(path) as file:
        while line := file.readline(ROW_BYTES + 1):
            number += 1
            yield number, position, line
            begin, position = position, position + len(line)
            while line[-1:] != b"\n" and (line := file.readline(ROW_BYTES)):  # the rest of a row that is too long
                position += len(line)
                if position - begin > _LONGEST:
                    raise ValueError(f"{name}:{number}: a row of more than {_LONGEST:,} bytes; this is no file of rows")


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line. Lines end at a line feed: a carriage return before it is ignored, U+2028 inside a
    string is text. Blank lines are no rows, and a byte-order mark is ignored.
    """

    def split(self, path: Path, name: str) -> Iterator[Row]:
        return (row for row in _lines(path, name) if row[2].removeprefix(_BOM).strip())

    def parse(self, raw: bytes, where: str) -> dict[str, Any]:
        return parse_object(raw, where)


@dataclass(frozen=True)
class JsonList:
    """One JSON list of objects, over any number of lines."""

    def split(self, path: Path, name: str) -> Iterator[Row]:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            depth, line, counted, start = 0, 1, 0, 0
            for found in _TOKEN.finditer(content):
                place, token = found.start(), content[found.start()]
                if depth == 1 and token in b",]":
                    begin = _after_space(content, start)
                    raw = content[begin : min(place, begin + ROW_BYTES + 1)].rstrip()
                    line, counted = line + content[counted:begin].count(b"\n"), begin
                    if raw or token == ord(","):
                        yield line, begin, raw
                if token in b"[{":
                    depth += 1
                elif token == ord("]") or (token == ord("}") and depth > 1):  # one too many is a fault of its row
                    depth -= 1
                elif token == ord('"') and found.end() == place + 1:
                    break  # a text without end
                if depth == 1 and token in b"[,":
                    start = place + 1
                if not depth:
                    if _after_space(content, place + 1) < len(content):
                        raise ValueError(f"{name}: more than one JSON value; write one object per line")
                    return
            raise ValueError(f"{name}: a JSON list without its end; restore the file")

    def parse(self, raw: bytes, where: str) -> dict[str, Any]:
        return parse_object(raw, where)


def _after_space(content: mmap.mmap, place: int) -> int:
    found = _SPACE.match(content, place)
    return found.end() if found else place


class _Feed:
    """Lines for a reader of CSV, some of them again; ``taken``: those of the record being read."""

    def __init__(self, lines: Iterator[Row]) -> None:
        self.lines, self.again = lines, deque[Row]()
        self.taken: list[Row] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.lines)
        self.taken.append(line)
        if line[1] + len(line[2]) - self.taken[0][1] > ROW_BYTES:
            raise csv.Error("a row without end")
        return line[2].decode("latin-1")  # as long as its bytes; of them, only ASCII has a meaning here


@dataclass(frozen=True)
class Csv:
    """Comma-separated values (RFC 4180) under a line of column names; every value is text, as it is written.

    A row may have fewer fields than the header (columns it lacks), not more. Behind a row with a wrong quote, reading
    goes on at the next line.
    """

    columns: tuple[str, ...]
    separator: str = ","

    @classmethod
    def of(cls, path: Path, name: str, separator: str) -> Csv:
        """The format of a file, from its header. ValueError for a bad one, or a column named twice."""
        format = cls((), separator)
        for line, _, raw in islice(format._records(path, name), 1):
            columns = format._fields(raw, f"{name}:{line}")
            twice = [column for number, column in enumerate(columns) if column in columns[:number]]
            if twice:
                raise ValueError(f"{name}:{line}: two columns {twice[0][:80]!r}; rename one")
            format = cls(tuple(columns), separator)
        return format

    def split(self, path: Path, name: str) -> Iterator[Row]:
        return islice(self._records(path, name), 1, None)

    def parse(self, raw: bytes, where: str) -> dict[str, Any]:
        fields = self._fields(raw, where)
        if len(fields) > len(self.columns):
            raise ValueError(
                f"{where}: {len(fields)} fields, where the header names {len(self.columns)} columns; fix or remove it"
            )
        return dict(zip(self.columns, fields))

    def _records(self, path: Path, name: str) -> Iterator[Row]:
        feed = _Feed(_lines(path, name))
        reader = csv.reader(feed, strict=True, delimiter=self.separator)
        while True:
            feed.taken = []
            try:
                fields = next(reader, None)
            except csv.Error:
                feed.again.extendleft(reversed(feed.taken[1:]))
                fields, feed.taken = [""], feed.taken[:1]
            if fields is None:
                return
            if fields:
                number, start, _ = feed.taken[0]
                yield number, start, b"".join(line for _, _, line in feed.taken)

    def _fields(self, raw: bytes, where: str) -> list[str]:
        lines = _text(raw, where).removesuffix("\n").split("\n")
        try:
            return next(csv.reader((line + "\n" for line in lines), strict=True, delimiter=self.separator))
        except csv.Error as error:
            raise ValueError(f"{where}: not valid CSV ({error}); fix or remove the line") from None


csv.field_size_limit(ROW_BYTES)  # of all readers in the process


def json_format(path: Path, name: str) -> RowFormat | None:
    """How a JSON file, called ``name``, holds its rows; some of them may be broken. None: it is no file of rows."""
    head = list(islice(JsonLines().split(path, name), _HEAD))
    if not head:
        return JsonLines() if not path.stat().st_size else None
    if head[0][2].removeprefix(_BOM).lstrip().startswith(b"["):
        return JsonLines() if len(head) > 1 and _is_json(head[0][2]) else JsonList()
    if any(suffix in _LINES_NAMED for suffix in Path(name).suffixes):
        return JsonLines()
    for _, _, line in head:
        with contextlib.suppress(ValueError):
            parse_object(line, "")
            return JsonLines()
    return None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.removeprefix(_BOM))
    except (ValueError, RecursionError):
        return False
    return True
