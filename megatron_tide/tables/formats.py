"""Text files of rows, as JSON Lines, one JSON list or CSV: where each row is, and what it says.

A bad row is one row: it is found like the others, and refused only when it is read.
"""

from __future__ import annotations

import contextlib
import csv
import json
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
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
_NEXT, _NEXT_OR_COMMA = (  # of JSON, the next bracket outside of texts, or a quote that is never closed
    re.compile(rb'(?:[^"\[\]{}%b]++|"(?:[^"\\]++|\\.)*+")*+["\[\]{}%b]' % (also, also), re.DOTALL)
    for also in (b"", b",")
)
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
    text = _text(raw.removeprefix(_BOM), where)  # also where files with one were joined
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
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (at byte {error.start}); fix or remove the line") from None


def _lines(path: Path, name: str) -> Iterator[Row]:
    """Every line, with its line feed, without the file's byte-order mark; of one that is too long, its start."""
    number = 0
    with open_regular(path) as file:
        position = file.seek(len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
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
            depth, line, counted, start, place = 0, 1, 0, 0, -1
            while found := (_NEXT_OR_COMMA if depth == 1 else _NEXT).match(content, place + 1):
                place = found.end() - 1
                token = content[place]
                if depth == 1 and token in b",]":
                    begin = _after_space(content, start)
                    if place - start > _LONGEST:
                        raise ValueError(f"{name}:{line}: an item of more than {_LONGEST:,} bytes; fix or remove it")
                    raw = content[begin : min(place, begin + ROW_BYTES + 1)].rstrip()
                    line, counted = line + content[counted:begin].count(b"\n"), begin
                    if raw or token == ord(","):
                        yield line, begin, raw
                if token in b"[{":
                    depth += 1
                elif token == ord("]") or (token == ord("}") and depth > 1):  # one too many is a fault of its row
                    depth -= 1
                elif token == ord('"'):
                    break
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
        """Lines, joined where a quote is open at their end. ``state``: of a text that is open in front of a line which
        ``ahead`` has read already, behind the last one of those, where ``known`` is; so each is read twice at most.
        """
        ahead, known, state, behind = _lines(path, name), 0, "bad", 0
        with open_regular(path) as file:
            for number, start, raw in _lines(path, name):
                end = start + len(raw)
                if start < behind or not raw.strip(b"\r\n"):
                    continue
                if len(raw) <= ROW_BYTES and self._state(raw, False) == "open":
                    if known <= end:
                        known, state = end, "open"
                    while state == "open" and known - start <= ROW_BYTES:
                        line = next(ahead, None)
                        if line is None:
                            state = "bad"
                        elif line[1] >= known:
                            known = line[1] + len(line[2])
                            state = "bad" if len(line[2]) > ROW_BYTES else self._state(line[2], True)
                    if state == "closed" and known - start <= ROW_BYTES:
                        file.seek(start)
                        raw, behind = file.read(known - start), known
                yield number, start, raw

    def _state(self, line: bytes, is_open: bool) -> str:
        """What a line is, at whose start a quote is open or not: "closed" (ends its row), "open" at its end, "bad"."""
        if b'"' not in line:
            return "open" if is_open else "closed"
        found = _line_of_csv(self.separator).fullmatch(b'"' + line if is_open else line)
        return "bad" if found is None else "open" if found["open"] is not None else "closed"

    def _fields(self, raw: bytes, where: str) -> list[str]:
        lines = _text(raw, where).removesuffix("\n").split("\n")
        try:
            return next(csv.reader((line + "\n" for line in lines), strict=True, delimiter=self.separator))
        except csv.Error as error:
            raise ValueError(f"{where}: not valid CSV ({error}); fix or remove the line") from None


@cache
def _line_of_csv(separator: str) -> re.Pattern[bytes]:
    """Fields up to a line's end, in the last of which a quote may be open."""
    quoted, between = rb'"(?:[^"]++|"")*+', re.escape(separator.encode())
    field = rb'(?:%b"|(?!")[^%b\r\n]*+)' % (quoted, between)
    return re.compile(rb"(?:%b%b)*+(?:(?P<open>%b)|%b[\r\n]*+)" % (field, between, quoted, field))


csv.field_size_limit(ROW_BYTES)  # of all readers in the process


def json_format(path: Path, name: str) -> RowFormat | None:
    """How a JSON file, called ``name``, holds its rows; some of them may be broken. None: it is no file of rows."""
    rows = JsonLines().split(path, name)
    first = next(rows, None)
    if first is None:
        return JsonLines() if not path.stat().st_size else None
    if first[2].lstrip().startswith(b"["):
        return JsonLines() if _is_json(first[2]) and next(rows, None) else JsonList()
    if any(suffix in _LINES_NAMED for suffix in Path(name).suffixes):
        return JsonLines()
    for _, _, line in islice(chain([first], rows), _HEAD):
        with contextlib.suppress(ValueError):
            parse_object(line, "")
            return JsonLines()
    if len(first[2]) <= ROW_BYTES:
        _text(first[2], f"{name}:{first[0]}")
    return None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
