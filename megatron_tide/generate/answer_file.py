"""Answers in a JSON Lines file: written as they come, and kept when the same command runs again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tide.bridge import TextTokenizer
from megatron_tide.files import atomic_write, fingerprint
from megatron_tide.generate.complete import Completion
from megatron_tide.generate.prompts import Prompt
from megatron_tide.tables import read_rows


class AnswerFile:
    """One row per prompt: ``prompt``, ``answer``, ``tokens``, ``finished``, ``reference`` and ``key``.

    A key holds all that decides an answer: ``decides`` (model and settings), the prompt's ids and its seed. Rows are
    appended while answers come; :meth:`close` puts them into the order of the prompts.

    Raises:
        ValueError: the file has a row that belongs to no prompt: of another model, other settings, or another file.
    """

    def __init__(
        self, path: Path, tokenizer: TextTokenizer, prompts: Sequence[Prompt], seeds: Sequence[int], decides: Any
    ) -> None:
        self._path, self._tokenizer, self._prompts = path, tokenizer, prompts
        who = [decides, tokenizer.fingerprint]
        self._keys = [fingerprint([who, prompt.ids.tolist(), seed]) for prompt, seed in zip(prompts, seeds)]
        self._rows: dict[str, dict[str, Any]] = {}
        bad: list[str] = []  # the last line of a killed run
        for where, row in read_rows(path, bad) if path.exists() else ():
            if row.get("key") not in self._keys:
                raise ValueError(
                    f"{where}: an answer of another model, prompt or setting; give another --json, or remove that file"
                )
            self._rows[row["key"]] = row
        if bad:
            self._write(self._rows.values())

    @property
    def missing(self) -> list[int]:
        """The places of the prompts without an answer."""
        return [place for place, key in enumerate(self._keys) if key not in self._rows]

    def add(self, answers: Mapping[int, Completion]) -> None:
        """Append the answers of a batch, by the places of their prompts."""
        with self._path.open("a", encoding="utf-8") as file:
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
                self._rows[self._keys[place]] = row
                file.write(_line(row))

    def close(self) -> None:
        """Write the file once more, in the order of the prompts."""
        self._write([self._rows[key] for key in self._keys])

    def _write(self, rows: Any) -> None:
        atomic_write(self._path, "".join(map(_line, rows)).encode())


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029") + "\n"
