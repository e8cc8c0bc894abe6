"""lm-eval's response cache as it is kept here: answers, and the verdicts on programs, as JSON. Imports lm-eval."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api.model import CachingLM
from sqlitedict import SqliteDict

from megatron_tide.bridge.chat import Rendered
from megatron_tide.evaluate.thoughts import Answer
from megatron_tide.files import fingerprint

_KINDS = ("generate_until", "loglikelihood", "loglikelihood_rolling")


class ResponseCache(CachingLM):
    """lm-eval's response cache. A key holds the request and which parts of its prompt are message text; values are
    JSON: reading a cache runs no code, as unpickling could.

    Raises:
        ValueError: the file is not such a cache.
    """

    def __init__(self, lm: Any, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(path)) as database:
                database.execute("pragma schema_version")
        except sqlite3.Error as error:
            raise ValueError(f"{path}: not a response cache ({error}); remove it to start again") from None
        self.dbdict = SqliteDict(str(path), autocommit=True, encode=_to_json, decode=_from_json)
        self.lm, self.cache_db = lm, str(path)
        lm.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.lm, name)
        return partial(self._answer, name, found) if name in _KINDS else found

    def _answer(self, kind: str, ask: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        keys = [_request_key(kind, request.args) for request in requests]
        new = [number for number, key in enumerate(keys) if key not in self.dbdict]
        found = dict(zip(new, ask([requests[number] for number in new]) if new else []))
        self.dbdict.update({keys[number]: found[number] for number in new})
        return [found[number] if number in found else self.dbdict[key] for number, key in enumerate(keys)]

    def add_partial(self, kind: str, args: Sequence[Any], answer: Any) -> None:
        """Keep an answer at once."""
        self.dbdict[_request_key(kind, args)] = answer

    def __enter__(self) -> ResponseCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.dbdict.close()


def _request_key(kind: str, args: Sequence[Any]) -> str:
    # Equal texts are other ids where other parts of them are message text.
    return fingerprint([kind, *((one, one.content) if isinstance(one, Rendered) else one for one in args)])


def _to_json(value: Any) -> str:
    return json.dumps(
        {"text": value, **vars(value)} if isinstance(value, Answer) and any(vars(value).values()) else value
    )


def _from_json(text: str) -> Any:
    value = json.loads(text)
    if not (isinstance(value, dict) and "notes" in value):
        return value
    return Answer(value["text"], tuple(value["notes"]), value["tokens"], value["passes"])
