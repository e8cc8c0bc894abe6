"""Answers in a JSON Lines file: written as they come, and kept when the same command runs again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tide.bridge import TextTokenizer
from megatron_tide.data.sources import WRITTEN
from megatron_tide.files import appending, atomic_write, check_form, fingerprint, read_whole
from megatron_tide.generate.complete import Completion
from megatron_tide.generate.prompts import Prompt
from megatron_tide.tables import read_rows

_START = '{"prompt": '
_ROW = {"answer": str, "tokens": range(1 << 31), "finished": bool, "key": str}


class AnswerFile:
    """One row per prompt: ``prompt``, ``answer``, ``tokens``, ``finished``, ``reference`` and ``key``.

    A key holds all that decides an answer: ``decides`` (the model's identity, code and settings), the prompt's ids and
    its seed. ``as_written``: rows have the answer's ``ids`` and ``order`` too. Rows are appended while answers come;
    :meth:`close` puts them into the order of the prompts.

    Raises:
        ValueError: the file has a row that belongs to no prompt: of another model, other settings, or another file; or
            lines that are no rows, but for one that a killed run left half.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: TextTokenizer,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        decides: Any,
        as_written: bool = False,
    ) -> None:
        self._path, self._tokenizer, self._prompts = path, tokenizer, prompts
        self._form = {**_ROW, **WRITTEN} if as_written else _ROW
        who = [decides, tokenizer.fingerprint]
        asked = [[prompt.ids.tolist(), *prompt.parts] for prompt in prompts]
        self._keys = [fingerprint([who, *one, seed]) for one, seed in zip(asked, seeds)]
        self._rows: dict[str, dict[str, Any]] = {}
        self._known = set(self._keys)
        if path.exists() and self._read(path):
            self._write(self._rows.values())

    def _read(self, path: Path) -> bool:
        """Whether a line of the file, the last one of a killed run, is no row."""
        bad: list[str] = []
        for where, row in read_rows(path, bad):
            key = row.get("key")
            if not isinstance(key, str) or key not in self._known:
                raise ValueError(
                    f"{where}: an answer of another model, prompt or setting; use another file, or remove that one"
                )
            check_form(row, self._form, f"{where}:", "; remove that line")
            self._rows[key] = row
        last = read_whole(path).decode("utf-8", "replace").rstrip("\n").rpartition("\n")[2] if bad else ""
        if len(bad) > 1 or not (last.startswith(_START) or _START.startswith(last)):
            raise ValueError(f"{path}: not a file of answers; use another one ({bad[0]})")
        return bool(bad)

    def take(self, parts: Sequence[Path]) -> None:
        """Move the answers of other files, to some of the same prompts, to this one."""
        for part in parts:
            self._read(part)
        if parts:
            self._write(self._rows.values())
        for part in parts:
            part.unlink()

    @property
    def missing(self) -> list[int]:
        """The places of the prompts without an answer."""
        return [place for place, key in enumerate(self._keys) if key not in self._rows]

    def add(self, answers: Mapping[int, Completion]) -> None:
        """Append the answers of a batch, by the places of their prompts."""
        with appending(self._path) as file:
            for place, answer in sorted(answers.items()):
                prompt = self._prompts[place]
                row = {
                    "prompt": prompt.shown,
                    "answer": prompt.answer(self._tokenizer, answer),
                    "tokens": len(answer.ids),
                    "finished": answer.finished,
                    "reference": prompt.reference,
                    "key": self._keys[place],
                }
                row |= {name: list(getattr(answer, name)) for name in WRITTEN if name in self._form}
                self._rows[self._keys[place]] = row
                file.write(_line(row))

    def close(self) -> list[dict[str, Any]]:
        """Write the file once more, in the order of the prompts; its rows, equal prompts with a reference each."""
        told = ({"prompt": prompt.shown, "reference": prompt.reference} for prompt in self._prompts)
        rows = [{**self._rows[key], **own} for key, own in zip(self._keys, told)]
        self._write(rows)
        return rows

    def _write(self, rows: Any) -> None:
        atomic_write(self._path, "".join(map(_line, rows)).encode("utf-8", "backslashreplace"))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029") + "\n"
