"""Results sample by sample on disk, so that a killed evaluation goes on where it was.

One JSONL file holds one kind of result under one set of settings; its name ends in the settings' fingerprint and its
first line says what they are, so results of other settings, other weights or another prompt never mix. Samples are
computed in windows that depend on their number only. A window that is not whole is computed whole again: a resumed
evaluation runs the very batches of one that was never stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.files import fingerprint


@dataclass(frozen=True)
class Item:
    """One sample: what it is called, a fingerprint of what goes in, and what goes in."""

    key: str
    input: str
    content: Any


class Store:
    """The results of one file."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}-{fingerprint(settings)[:12]}.jsonl"
        self._found: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read()
        else:
            self._append([{"settings": settings}])

    def get(self, item: Item) -> Any:
        """The value on record, or None."""
        row = self._found.get(item.key)
        return row["value"] if row is not None and row["input"] == item.input else None

    def add(self, items: Sequence[Item], values: Sequence[Any]) -> None:
        """Put values on record: they are on the disk when this returns."""
        rows = [{"key": item.key, "input": item.input, "value": value} for item, value in zip(items, values)]
        self._append(rows)
        self._found |= {row["key"]: row for row in rows}

    def _read(self) -> None:
        content, whole = self.path.read_bytes(), 0
        for line in content.splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(row, dict):
                break
            whole += len(line)
            if "key" in row:
                self._found[row["key"]] = row
        if whole < len(content):  # what a killed evaluation left half written, and nothing else, is at the end
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _append(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())


def resumed(
    store: Store,
    items: Sequence[Item],
    compute: Callable[[list[Any], int], list[Any]],
    window: int,
    progress: Callable[[int], None],
) -> list[Any]:
    """The value of each item: from the store, or ``compute(contents, number of the first)``, a window at a time."""
    values: list[Any] = []
    for first in range(0, len(items), window):
        part = list(items[first : first + window])
        found = [store.get(item) for item in part]
        if any(value is None for value in found):
            found = compute([item.content for item in part], first)
            store.add(part, found)
        values += found
        progress(len(values))
    return values
