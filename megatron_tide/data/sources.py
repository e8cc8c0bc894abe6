"""Sources of conversations: JSON Lines, Parquet, folders and the hub, single or as a weighted mixture.

A mixture is a JSON file ``{"sources": [{...}, ...]}``; the fields of a source are those of ``SourceSpec``. All sources
together become one list of positions (source, row), the same on every machine, which workers read in any order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tide.bounds import LONGEST_NAME, MOST_IDS, shown
from megatron_tide.files import check_form, fingerprint, read_json, write_once
from megatron_tide.hub import one_line
from megatron_tide.tables import (
    AS_WRITTEN,
    BESIDE,
    LONGEST_TEXT,
    UNREADABLE_SHARE,
    Message,
    Table,
    TextTable,
    open_table,
)
from megatron_tide.tables import conversation as read_conversation

_CONTAINS = "contains"
_ASIDE = ("system", "system_prompt", "instruction", "input", "context", "documents", "functions")
"""Columns in which other formats have a part of a conversation."""
WRITTEN = {"ids": [range(MOST_IDS)], "order": [range(1, 1 << 31)]}
"""Form of a response as the student wrote it: its tokens, and the pass that decided each."""
MOST_COPIES, MOST_POSITIONS = 1000, 1 << 27  # of a row, and of a source that is taken more than once


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """One source of a mixture.

    ``path``: a .jsonl or .parquet file, a folder, or a name on the hub; searched next to the mixture file first.
    ``name``, ``split``, ``revision``: the data set's configuration, split and commit. ``weight``: copies of each row;
    0.25 keeps a quarter of the rows, 2.5 takes each row twice and half of them a third time, chosen by a hash of the
    row's number. ``messages_column``, or ``prompt_column`` and ``response_column`` for one prompt and one response per
    row. ``filter``: column -> a value, a list of values, or {"contains": text}; only matching rows count.
    ``max_chars``: longer conversations are dropped, and counted. ``own``: the student wrote the responses, so they are
    nothing to learn by heart: they have no denoising loss and no next-token loss. ``written_column``: with ``own``,
    the response as it wrote it, {"ids": tokens, with its end of text, "order": the pass that decided each}.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    weight: float = 1.0
    messages_column: str = "messages"
    prompt_column: str | None = None
    response_column: str | None = None
    filter: dict[str, Any] = field(default_factory=dict)
    max_chars: int | None = None
    own: bool = False
    written_column: str | None = None

    @classmethod
    def parse(cls, entry: Any, where: str) -> SourceSpec:
        """A source from its JSON; ValueError naming ``where`` for unknown fields, wrong types and impossible values."""
        kinds: dict[str, tuple[type, ...]] = {
            "weight": (int, float),
            "filter": (dict,),
            "max_chars": (int,),
            "own": (bool,),
        }
        optional = [f.name for f in fields(cls) if f.default is None]
        known = [f.name for f in fields(cls)]
        if not isinstance(entry, dict) or "path" not in entry:
            raise ValueError(f'{where}: a source is an object with at least a "path"')
        for key, value in entry.items():
            if key not in known:
                raise ValueError(f"{where}: unknown field {key!r}; the fields are {', '.join(known)}")
            if value is None and key in optional:
                continue
            if isinstance(value, bool) != (key == "own") or not isinstance(value, kinds.get(key, (str,))):
                raise ValueError(f"{where}: {key} cannot be {shown(value)}")
            if (isinstance(value, str) and not 0 < len(value) <= LONGEST_NAME) or "\0" in str(value):
                raise ValueError(f"{where}: {key} is {shown(value)}, which is no name")
        spec = cls(**entry)
        if not 0 < spec.weight <= MOST_COPIES:
            raise ValueError(
                f"{where}: weight is {spec.weight}; it must be above 0 (to skip a source, remove it), and at most "
                f"{MOST_COPIES}"
            )
        if (spec.prompt_column is None) != (spec.response_column is None):
            raise ValueError(f"{where}: prompt_column and response_column go together")
        if spec.written_column is not None and not spec.own:
            raise ValueError(f'{where}: written_column is of responses that the student wrote; add "own": true')
        for column, rule in spec.filter.items():
            if isinstance(rule, dict) and (set(rule) != {_CONTAINS} or not isinstance(rule[_CONTAINS], str)):
                raise ValueError(f'{where}: filter of {column!r} must be a value, a list, or {{"contains": "text"}}')
        return spec

    def is_too_long(self, messages: Sequence[Message]) -> bool:
        """Whether a conversation has more than ``max_chars`` characters."""
        return self.max_chars is not None and sum(len(one["content"]) for one in messages) > self.max_chars

    @property
    def columns(self) -> list[str]:
        """The columns a conversation is made of."""
        if self.prompt_column is None or self.response_column is None:
            return [self.messages_column]
        return [self.prompt_column, self.response_column]


@dataclass(frozen=True)
class DataSource:
    """An opened source: the rows that pass its filter. ``description``: what was read, for manifests."""

    spec: SourceSpec
    rows: Table
    selected: NDArray[np.int64]

    @classmethod
    def open(cls, spec: SourceSpec, folder: Path) -> DataSource:
        """Open ``spec``; relative paths are looked for in ``folder``, then in the working directory."""
        rows = open_table(spec.path, folder, name=spec.name, split=spec.split, revision=spec.revision)
        needed = {*spec.columns, *spec.filter, *([spec.written_column] if spec.written_column else [])}
        missing = sorted(name for name in needed - set(rows.columns) if not rows.has(name))
        if missing and "input_ids" in rows.columns and len(rows):
            raise ValueError(
                f"{spec.path}: token ids of another preprocessing ({', '.join(rows.columns)}), without the text that "
                "prepare tokenises and aligns; use the data sets it was made from: recipes/mixtures/paper.json"
            )
        if missing and len(rows):
            raise ValueError(
                f"{spec.path}: no column {missing[0]!r}; it has {', '.join(rows.columns)}: name the right ones in a "
                "mixture file (messages_column, or prompt_column and response_column)"
            )
        aside = [name for name in rows.columns if name in _ASIDE and name not in needed]
        if aside:
            place = f"what it says belongs in {' or '.join(spec.columns)}"
            print(one_line(f"note: {spec.path}: column {aside[0]!r} is not read; {place}"), file=sys.stderr)
        if not isinstance(rows, TextTable):  # another column may hold what cannot be read
            rows = rows.only({*needed, *BESIDE})
        return cls(spec, rows, _select(spec, rows))

    @property
    def description(self) -> dict[str, Any]:
        spec = {f.name: getattr(self.spec, f.name) for f in fields(self.spec) if f.name != "own"}
        if self.spec.written_column is None:  # folders of before it do not state it
            del spec["written_column"]
        return spec | {"content": self.rows.content, "rows": len(self.rows), "selected": len(self.selected)}

    def copies(self) -> NDArray[np.int64]:
        """Row numbers of the source as the mixture has them: ``weight`` copies of the selected ones."""
        full, part = divmod(self.spec.weight, 1.0)
        if full > 1 and full * len(self.selected) > MOST_POSITIONS:
            raise ValueError(
                f"{self.spec.path}: weight {self.spec.weight} of {len(self.selected):,} rows makes more than "
                f"{MOST_POSITIONS:,}; use a smaller one"
            )
        salt = int(fingerprint([self.rows.content, self.spec.name, self.spec.split])[:16], 16)
        extra = self.selected[_uniform(self.selected, salt) < part]
        return np.concatenate([np.repeat(self.selected, int(full)), extra])

    def _written(self, content: dict[str, Any], where: str) -> dict[str, list[int]]:
        """``written_column`` of a row, checked."""
        column = str(self.spec.written_column)
        found: dict[str, list[int]] = content.get(column, {})
        if isinstance(found, dict) and any(isinstance(v, list) and len(v) > LONGEST_TEXT for v in found.values()):
            raise ValueError(f"{where}: {column} has more than {LONGEST_TEXT:,} tokens; remove the row")
        check_form({column: found}, {column: WRITTEN}, f"{where}:")
        if len(found["ids"]) != len(found["order"]):
            raise ValueError(f"{where}: {column} has ids and an order of different lengths")
        return found

    def conversation(self, row: int) -> list[Message]:
        """The messages of a row; ValueError naming file and row when it is malformed."""
        content = self.rows.get(row)
        where = self.rows.where(row)
        values = []
        for column in self.spec.columns:
            if column not in content:
                raise ValueError(f"{where}: no column {column!r}; it has {', '.join(content)}")
            values.append(content[column])
        if self.spec.prompt_column is None:
            messages = read_conversation(content, self.spec.messages_column, where)
            if self.spec.written_column is not None:
                messages[-1:] = [{**message, AS_WRITTEN: self._written(content, where)} for message in messages[-1:]]
            return messages
        prompt, response = values
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        return read_conversation({**content, "messages": turns}, "messages", where)


@dataclass(frozen=True)
class Mixture:
    """All positions of all sources: ``source`` and ``row`` identify it, ``key`` is its permanent number."""

    sources: tuple[DataSource, ...]
    source: NDArray[np.int32]
    row: NDArray[np.int64]
    key: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def ordered(self) -> bool:
        """Whether a source says in which order its responses were written."""
        return any(source.spec.written_column is not None for source in self.sources)

    @property
    def own(self) -> list[list[int]]:
        """The keys of the sources whose responses the student wrote: first and last of each."""
        keys = (self.key[self.source == number] for number, source in enumerate(self.sources) if source.spec.own)
        return [[int(part[0]), int(part[-1])] for part in keys if len(part)]

    def limited(self, limit: int | None) -> Mixture:
        """``limit`` positions of the mixture, chosen over all of it by a hash of their keys, in order."""
        if limit is None or limit >= len(self):
            return self
        chosen = np.sort(np.argsort(_mixed(self.key, 0), kind="stable")[:limit])
        return Mixture(self.sources, self.source[chosen], self.row[chosen], self.key[chosen])

    def conversation(self, position: int) -> tuple[SourceSpec, list[Message]]:
        """The source's description and the messages at a position."""
        source = self.sources[self.source[position]]
        return source.spec, source.conversation(int(self.row[position]))

    def error(self, position: int) -> str:
        """Why the row at a position cannot be read, with its file and line; "" when it can."""
        try:
            self.conversation(position)
        except ValueError as error:
            return str(error)
        return ""


def check_unreadable(mixture: Mixture, count: int, positions: Sequence[int]) -> None:
    """ValueError when more than ``UNREADABLE_SHARE`` of the rows, ``count`` of them, cannot be read.

    ``positions``: those of the first ones.
    """
    if count > UNREADABLE_SHARE * len(mixture):
        share = f"{count:,} of {len(mixture):,} rows cannot be read, more than {UNREADABLE_SHARE:.0%}"
        raise ValueError(f"{mixture.error(positions[0])}; {share}")


def open_mixture(paths: Sequence[str]) -> Mixture:
    """Open data files, folders, hub names (``owner/name``) and mixture files (.json), one after the other."""
    sources: list[DataSource] = []
    for path in paths:
        if path.endswith(".json"):
            sources += [_of_mixture(spec, path) for spec in read_mixture(path)]
        else:
            sources.append(DataSource.open(SourceSpec(path=path), Path()))
    copies = [source.copies() for source in sources]
    sizes = [len(rows) for rows in copies]
    if not sum(sizes):
        raise ValueError(f"{', '.join(paths)}: no row to read (empty, or no row passes the filters)")
    return Mixture(
        sources=tuple(sources),
        source=np.repeat(np.arange(len(sources), dtype=np.int32), sizes),
        row=np.concatenate(copies),
        key=np.arange(sum(sizes), dtype=np.int64),
    )


def _of_mixture(spec: SourceSpec, path: str) -> DataSource:
    try:
        return DataSource.open(spec, Path(path).parent)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def write_sample(data: Sequence[str], out: Path, limit: int) -> tuple[int, list[str]]:
    """Write ``limit`` conversations, chosen evenly over ``data``, as JSON Lines; -> (count, reasons for skipped rows).

    Raises:
        ValueError: ``out`` is not a .jsonl file, or already exists with other content.
    """
    if out.suffix != ".jsonl":
        raise ValueError(f"{out}: the output file name must end in .jsonl")
    mixture = open_mixture(data).limited(limit)
    unreadable = [position for position in range(len(mixture)) if mixture.error(position)]
    check_unreadable(mixture, len(unreadable), unreadable)
    kept = sorted(set(range(len(mixture))) - set(unreadable))
    rows = [{"id": int(mixture.key[n]), "messages": mixture.conversation(n)[1]} for n in kept]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    write_once(out, content)
    return len(rows), [mixture.error(position) for position in unreadable]


def read_mixture(path: str) -> list[SourceSpec]:
    """The sources that a mixture file names; ValueError naming file and place."""
    mixture = read_json(Path(path), 'a mixture is {"sources": [{"path": ...}, ...]}')
    entries = mixture.get("sources")
    unknown = sorted(set(mixture) - {"sources", "description"})
    if not isinstance(entries, list) or not entries or unknown:
        found = f"unknown field {unknown[0]!r}" if unknown else 'no list "sources"'
        raise ValueError(f'{path}: {found}; a mixture is {{"sources": [{{"path": ...}}, ...]}}')
    return [SourceSpec.parse(entry, f"{path}: sources[{number}]") for number, entry in enumerate(entries)]


def _select(spec: SourceSpec, rows: Table) -> NDArray[np.int64]:
    if not spec.filter:
        return np.arange(len(rows), dtype=np.int64)
    columns = list(spec.filter)
    rules = list(spec.filter.values())
    passing = (
        number
        for number, values in enumerate(rows.scan(columns))
        if values is None or all(_passes(value, rule) for value, rule in zip(values, rules))
    )  # unreadable rows pass here; they are counted when they are read
    selected = np.fromiter(passing, np.int64)
    if not len(selected) and len(rows):
        first = next(iter(rows.scan(columns))) or ()
        has = ", ".join(f"{column!r} {shown(value)}" for column, value in zip(columns, first))
        raise ValueError(f"{spec.path}: no row passes the filter; the first one has {has}")
    return selected


def _passes(value: Any, rule: Any) -> bool:
    if isinstance(rule, dict):
        return isinstance(value, str) and rule[_CONTAINS] in value
    return value in rule if isinstance(rule, list) else value == rule


def _mixed(numbers: NDArray[np.int64], salt: int) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood 2014) of each number plus a salt: a hash that needs no state."""
    with np.errstate(over="ignore"):
        z = (numbers.astype(np.uint64) + np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _uniform(numbers: NDArray[np.int64], salt: int) -> NDArray[np.float64]:
    return (_mixed(numbers, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53
