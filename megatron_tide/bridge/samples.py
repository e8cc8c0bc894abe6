"""Texts to measure a bridge on: the assistants' words in a data file, which is what distillation will align."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any


def read_samples(paths: Sequence[Path], limit: int | None = None) -> list[str]:
    """Texts of all files, at most ``limit`` of each (None: all). ValueError for a broken file or one without texts.

    ``*.jsonl`` and ``*.parquet``: contents of the assistant turns of each row's ``messages``, or the row's ``text``.
    Any other file is one text. A folder stands for the data files in it.
    """
    texts: list[str] = []
    for path in paths:
        files = sorted(file for file in path.glob("*") if file.suffix in _READERS) if path.is_dir() else [path]
        found = [text for file in files for text in islice(_texts(file), limit)]
        if not any(found):
            raise ValueError(f"{path}: holds no assistant turn and no text to sample; check the path and the columns")
        texts.extend(found)
    return texts


def _texts(path: Path) -> Iterator[str]:
    if path.suffix not in _READERS:
        yield path.read_bytes().decode("utf-8", errors="replace")
        return
    for number, row in enumerate(_READERS[path.suffix](path), 1):
        messages = row.get("messages") if isinstance(row, Mapping) else None
        if messages is None and isinstance(row, Mapping) and isinstance(row.get("text"), str):
            yield row["text"]
            continue
        try:
            contents = [turn["content"] for turn in messages or () if turn["role"] == "assistant"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: row {number} has messages without role and content; fix the data") from error
        if not all(isinstance(content, str) for content in contents):
            raise ValueError(f"{path}: row {number} has an assistant's content that is no string; fix the data")
        yield from filter(None, contents)


def _jsonl(path: Path) -> Iterable[Any]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not valid JSON ({error.msg}); fix the data") from error


def _parquet(path: Path) -> Iterable[Any]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name in ("messages", "text")]
            for batch in file.iter_batches(columns=names):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise ValueError(f"{path}: is not readable as Parquet ({error}); fetch the file again") from error


_READERS = {".jsonl": _jsonl, ".parquet": _parquet}
