"""Texts to measure a bridge on: the assistant turns of a data file, which are what distillation aligns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_tide.files import open_regular, read_whole
from megatron_tide.tables import ASSISTANT, LONGEST_TEXT, check_bad, good_rows, parse_messages, read_rows
from megatron_tide.tables.folders import bounded
from megatron_tide.tables.unpack import ROWS


def read_samples(paths: Sequence[Path], limit: int | None = None) -> list[str]:
    """Texts of all files, at most ``limit`` of each (None: all). ValueError for a broken file or one without texts.

    Rows that cannot be read are left out and told; too many end it (``check_bad``).

    ``*.jsonl`` and ``*.parquet``: contents of the assistant turns of each row's ``messages``, or the row's ``text``.
    Any other file is one text. A folder means the data files in it.
    """
    texts: list[str] = []
    for path in paths:
        files = sorted(file for file in path.glob("*") if file.suffix in _READERS) if path.is_dir() else [path]
        found = [text for file in files for text in _texts(file, limit)]
        if not any(found):
            raise ValueError(f"{path}: no assistant turn and no text to sample; check the path and the columns")
        texts.extend(found)
    return texts


def _texts(path: Path, limit: int | None) -> list[str]:
    if path.suffix not in _READERS:
        try:
            return checked_texts([read_whole(path).decode("utf-8-sig")], str(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 (at byte {error.start}); give text, .jsonl or .parquet") from None
    bad: list[str] = []
    rows = good_rows(_READERS[path.suffix](path, bad), bad, _of_row)
    texts = list(islice((text for row in rows for text in row), limit))
    check_bad(bad, len(texts))
    return texts


def _of_row(row: dict[str, Any], where: str) -> list[str]:
    if row.get("messages") is None and isinstance(row.get("text"), str):
        texts = [row["text"]]
    else:
        turns = parse_messages(row.get("messages"), where)
        texts = [turn["content"] for turn in turns if turn["role"] == ASSISTANT and turn["content"]]
    return checked_texts(texts, where)


def checked_texts(texts: list[str], where: str) -> list[str]:
    """``texts``; ValueError for one that tokenizers fail on: longer than ``LONGEST_TEXT``, or no Unicode."""
    if any(len(text) > LONGEST_TEXT for text in texts):
        raise ValueError(f"{where}: a text of more than {LONGEST_TEXT:,} characters; split it")
    "".join(texts).encode()  # UnicodeEncodeError for half a surrogate pair
    return texts


def _parquet(path: Path, bad: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet

    try:
        with bounded(path.stat().st_size), open_regular(path) as raw, parquet.ParquetFile(raw) as file:
            names = [name for name in file.schema_arrow.names if name in ("messages", "text")]
            batches = file.iter_batches(batch_size=ROWS, columns=names)
            rows = (batch.slice(n, 1) for batch in batches for n in range(len(batch)))
            for number, row in enumerate(rows):
                where = f"{path} row {number}"
                try:
                    (found,) = row.to_pylist()
                except UnicodeError as error:
                    bad.append(f"{where}: not UTF-8 ({error})")
                    continue
                yield where, found
    except (ArrowException, OSError, UnicodeError, MemoryError) as error:  # of the file itself
        raise ValueError(f"{path}: not readable as Parquet ({error}); download the file again") from error


Reader = Callable[[Path, list[str]], Iterator[tuple[str, dict[str, Any]]]]
_READERS: dict[str, Reader] = {".jsonl": read_rows, ".parquet": _parquet}
