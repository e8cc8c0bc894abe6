"""lm-eval's response cache as it is kept here: answers, and the verdicts on programs, as JSON in a table of SQLite.

Reading it runs no code. Imports lm-eval.
"""

from __future__ import annotations

import copy
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.model import CachingLM

from megatron_tide.bridge.chat import Rendered
from megatron_tide.evaluate.thoughts import Answer
from megatron_tide.files import check_form, fingerprint

_KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


class Store:
    """Keys and JSON values in a file of SQLite; what is set is on the disk. (sqlitedict's thread never answers again
    where a file is corrupt.)

    Raises:
        ValueError: the file is no such store, or a value is not JSON; one line that names it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a response cache (not a regular file); remove it to start again")
        with self._named():
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.execute("create table if not exists unnamed (key text primary key, value blob)")
            # A view or a trigger, of the name or on it, is a program, which may never end.
            others = (
                "select count(*) from sqlite_master where type in ('view', 'trigger') or sql like 'create virtual%'"
            )
            if self._database.execute(others).fetchone()[0]:
                raise ValueError("it holds more than a table")
            self._database.execute("select key, value from unnamed limit 1").fetchone()

    def __contains__(self, key: str) -> bool:
        return self._value(key) is not None

    def __getitem__(self, key: str) -> Any:
        value = self._value(key)
        if value is None:
            raise KeyError(key)
        with self._named():
            return _from_json(value.decode() if isinstance(value, bytes) else value)

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def update(self, values: Mapping[str, Any]) -> None:
        rows = [(key, _to_json(value)) for key, value in values.items()]
        with self._named():
            self._database.executemany("insert or replace into unnamed values (?, ?)", rows)

    def close(self) -> None:
        self._database.close()

    def _value(self, key: str) -> Any:
        with self._named():
            row = self._database.execute("select value from unnamed where key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError, TypeError, RecursionError, OverflowError, MemoryError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{self._path}: not a response cache ({reason}); remove it to start again") from None


class ResponseCache(CachingLM):
    """A model whose answers are kept. A key holds the request and which parts of its prompt are message text.

    Raises:
        ValueError: the file is not such a cache.
    """

    def __init__(self, lm: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.dbdict = Store(path)
        self.lm, self.cache_db = lm, str(path)
        lm.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.lm, name)
        return partial(self._answer, name, found) if name in _KINDS else found

    def _answer(self, kind: str, ask: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        requests = list(_told_apart(requests)) if kind == "generate_until" else requests
        keys = [_request_key(kind, request.args) for request in requests]
        new = [number for number, key in enumerate(keys) if key not in self.dbdict]
        found = dict(zip(new, ask([requests[number] for number in new]) if new else []))
        self.dbdict.update({keys[number]: found[number] for number in new})
        return [found[number] if number in found else self._kept(kind, key) for number, key in enumerate(keys)]

    def _kept(self, kind: str, key: str) -> Any:
        answer = self.dbdict[key]
        if isinstance(answer, str) != (kind == "generate_until"):
            raise ValueError(f"{self.cache_db}: not a response cache (an answer of another form); remove it")
        return answer

    def add_partial(self, kind: str, args: Sequence[Any], answer: Any) -> None:
        """Keep an answer at once."""
        self.dbdict[_request_key(kind, args)] = answer

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.dbdict.close()


def _told_apart(requests: Sequence[Any]) -> Iterator[Any]:
    """The requests, those that a task repeats with a number in their settings: each is a draw of its own."""
    seen: Counter[int] = Counter()
    for request in requests:
        number = seen[id(request)]
        seen[id(request)] += 1
        prompt, settings = request.args
        if number and settings.get("temperature"):
            request = copy.copy(request)
            request.arguments = (prompt, {**settings, "repeat": number})
        yield request


def _request_key(kind: str, args: Sequence[Any]) -> str:
    # Equal texts are other ids where other parts of them are message text.
    return fingerprint([kind, *((one, one.content) if isinstance(one, Rendered) else one for one in args)])


def _to_json(value: Any) -> str:
    return json.dumps(
        {"text": value, **vars(value)} if isinstance(value, Answer) and any(vars(value).values()) else value
    )


def _from_json(text: Any) -> Any:
    value = json.loads(text)
    if not (isinstance(value, dict) and "notes" in value):
        return value
    check_form(value, {"text": str, "notes": [str], "tokens": range(1 << 53), "passes": range(1 << 53)}, "an answer:")
    return Answer(value["text"], tuple(value["notes"]), value["tokens"], value["passes"])
