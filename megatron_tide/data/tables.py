"""Tables read at random, from several processes: JSON lines directly, the rest through the ``datasets`` library."""

from __future__ import annotations

import contextlib
import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_tide.files import fingerprint, sha256_file

_SCAN = 1000  # rows decoded at a time while a filter reads columns
_FILES = (".jsonl", ".parquet")
_KINDS = "a .jsonl or .parquet file, a folder, a hub name (owner/name) or a mixture .json"


class Table(Protocol):
    """A table. ``columns``: their names; ``content``: what decides its rows (a digest), for manifests."""

    @property
    def columns(self) -> list[str]: ...

    @property
    def content(self) -> str: ...

    def __len__(self) -> int: ...

    def get(self, row: int) -> dict[str, Any]:
        """The row as column -> value."""

    def where(self, row: int) -> str:
        """The row's place in words, for error messages."""

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        """The values of these columns, row after row."""


@dataclass(frozen=True)
class JsonLinesTable:
    """A file of one JSON object a line; blank lines are no rows. ``starts`` int64 [n] bytes, ``lines`` int64 [n]."""

    path: Path
    columns: list[str]
    content: str
    starts: NDArray[np.int64]
    lines: NDArray[np.int64]

    @classmethod
    def open(cls, path: Path) -> JsonLinesTable:
        """Index a file, reading it once."""
        starts, lines = array("q"), array("q")
        digest, position = hashlib.sha256(), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    starts.append(position)
                    lines.append(number)
                digest.update(line)
                position += len(line)
        rows = cls(path, [], digest.hexdigest(), np.array(starts, np.int64), np.array(lines, np.int64))
        if not len(rows):
            return rows
        return cls(path, list(rows.get(0)), rows.content, rows.starts, rows.lines)

    def __len__(self) -> int:
        return len(self.starts)

    def get(self, row: int) -> dict[str, Any]:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[row]))
            return self._parse(row, file.readline())

    def where(self, row: int) -> str:
        return f"{self.path}:{self.lines[row]}"

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for row in range(len(self)):
            content = self.get(row)
            yield tuple(content.get(column) for column in columns)

    def _parse(self, row: int, line: bytes) -> dict[str, Any]:
        try:
            content = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            raise ValueError(f"{self.where(row)}: not valid JSON ({error}); repair or remove the line") from None
        if not isinstance(content, dict):
            raise ValueError(f"{self.where(row)}: a {type(content).__name__}, not an object; repair or remove the line")
        return content


@dataclass(frozen=True)
class ArrowTable:
    """A table of the ``datasets`` library: memory-mapped, and small to send to a worker."""

    table: Any
    label: str
    columns: list[str]
    content: str

    def __len__(self) -> int:
        return len(self.table)

    def get(self, row: int) -> dict[str, Any]:
        return dict(self.table[row])

    def where(self, row: int) -> str:
        return f"{self.label} row {row}"

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for batch in self.table.select_columns(list(columns)).iter(batch_size=_SCAN):
            yield from zip(*(batch[column] for column in columns))


def open_table(path: str, folder: Path, *, name: str | None, split: str, revision: str | None) -> Table:
    """Open a file, a folder or a hub name; ValueError in one line for what cannot be read as a table."""
    found = next((p for p in (folder / path, Path(path)) if p.exists()), None)
    if found is None and (path.endswith(_FILES) or path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ValueError(f"{path}: no such file or folder; give {_KINDS}")
    if found is not None and found.is_file() and found.suffix == ".jsonl":
        return JsonLinesTable.open(found)
    if found is not None and found.is_file() and found.suffix != ".parquet":
        raise ValueError(f"{found}: a file of an unknown kind; give {_KINDS}")
    try:
        return _open_table(path, found, name, split, revision)
    except (ValueError, OSError, KeyError, _datasets_error()) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{found or path}: cannot be read as a data set, split {split!r} ({reason})") from None


def _open_table(path: str, found: Path | None, name: str | None, split: str, revision: str | None) -> ArrowTable:
    import datasets  # slow to import, and JSON lines do not need it

    if found is None:
        table = datasets.load_dataset(path, name, split=split, revision=revision)
        return ArrowTable(table, f"{path} {name or ''} {split}", list(table.column_names), table._fingerprint)
    with _quiet(datasets):
        if found.is_file():
            table, content = datasets.load_dataset("parquet", data_files=str(found), split="train"), sha256_file(found)
        else:
            table, content = _open_folder(datasets, found, name, split), _folder_digest(found, name, split)
    return ArrowTable(table, str(found), list(table.column_names), content)


def _open_folder(datasets: Any, folder: Path, name: str | None, split: str) -> Any:
    if (folder / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(folder))[split]
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(str(folder), name, split=split)


def _folder_digest(folder: Path, name: str | None, split: str) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return fingerprint([name, split, [(path.relative_to(folder).as_posix(), sha256_file(path)) for path in files]])


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars while local files are indexed; a download from the hub keeps them."""
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.utils.enable_progress_bars()


def _datasets_error() -> type[Exception]:
    from datasets.exceptions import DatasetsError

    return DatasetsError
