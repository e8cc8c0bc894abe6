"""Texts to measure a bridge on: the assistant turns of a data file, which are what distillation aligns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_tide.tables import ASSISTANT, parse_messages, read_rows


def read_samples(paths: Sequence[Path], limit: int | None = None) -> list[str]:
    """Texts of all files, at most ``limit`` of each (None: all). ValueError for a broken file or one without texts.

    ``*.jsonl`` and ``*.parquet``: contents of the assistant turns of each row's ``messages``, or the row's ``text``.
    Any other file is one text. A folder means the data files in it.
    """
    texts: list[str] = []
    for path in paths:
        files = sorted(file for file in path.glob("*") if file.suffix in _READERS) if path.is_dir() else [path]
        found = [text for file in files for text in islice(_texts(file), limit)]
        if not any(found):
            raise ValueError(f"{path}: no assistant turn and no text to sample; check the path and the columns")
        texts.extend(found)
    return texts


def _texts(path: Path) -> Iterator[str]:
    if path.suffix not in _READERS:
        yield path.read_bytes().decode("utf-8", errors="replace")
        return
    for where, row in _READERS[path.suffix](path):
        messages = row.get("messages")
        if messages is None and isinstance(row.get("text"), str):
            yield row["text"]
            continue
        turns = parse_messages([] if messages is None else messages, where)
        yield from (turn["content"] for turn in turns if turn["role"] == ASSISTANT and turn["content"])


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name in ("messages", "text")]
            rows = (row for batch in file.iter_batches(columns=names) for row in batch.to_pylist())
            yield from ((f"{path} row {number}", row) for number, row in enumerate(rows))
    except ArrowException as error:
        raise ValueError(f"{path}: not readable as Parquet ({error}); download the file again") from error


_READERS = {".jsonl": read_rows, ".parquet": _parquet}
