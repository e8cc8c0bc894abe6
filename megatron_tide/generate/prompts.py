"""Prompts from the command line, a text or JSONL file or prepared data; and answers with holes to fill."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tide.bridge import TextTokenizer
from megatron_tide.bridge.changes import changes, first_change
from megatron_tide.cli import say
from megatron_tide.data import PreparedData
from megatron_tide.generate.complete import Completion, prompt_ids
from megatron_tide.tables import ASSISTANT, check_bad, conversation, good_rows, read_rows

HOLE = re.compile(r"<mask:(\d+)>", re.ASCII)
MOST_MASKS = 1 << 20


@dataclass(frozen=True)
class Prompt:
    """``ids`` for the model; ``shown``: the same as text; ``reference``: the recorded answer, if there is one.

    ``begun``: number of trailing ids that belong to the answer already, including masks to fill, ``holes`` of them;
    ``parts``: their texts and numbers of ids, part by part, a hole's text being empty. ``changed``: where the ids stand
    for another text than the user's, see ``bridge.changes``.
    """

    ids: np.ndarray
    shown: str
    reference: str | None = None
    begun: int = 0
    holes: int = 0
    parts: tuple[tuple[str, int], ...] = ()
    changed: str = ""

    def answer(self, tokenizer: TextTokenizer, completion: Completion) -> str:
        """The full answer: the partial answer as it was given, with its holes filled, and the text after it."""
        if not self.parts:
            return tokenizer.decode(completion.ids)
        ids = [*completion.prompt[len(completion.prompt) - self.begun :], *completion.ids]
        pieces, said, place = tokenizer.token_bytes(ids), b"", 0
        for text, size in (*self.parts, ("", len(completion.ids))):
            said += text.encode() or b"".join(pieces[place : place + size])
            place += size
        return said.decode("utf-8", errors="replace")


def from_messages(tokenizer: TextTokenizer, messages: list[dict[str, str]]) -> Prompt:
    """A conversation up to its last assistant turn (the reference), or all of it if it does not end with one."""
    reference = None
    if messages and messages[-1]["role"] == ASSISTANT:
        messages, reference = messages[:-1], messages[-1]["content"]
    if not messages:
        raise ValueError("a conversation needs a message before the answer")
    changed = first_change(tokenizer, (message["content"] for message in messages))
    return Prompt(prompt_ids(tokenizer, messages), messages[-1]["content"], reference, changed=changed)


def from_text(tokenizer: TextTokenizer, text: str, system: str | None = None) -> Prompt:
    """One user message, after an optional system message."""
    before = [{"role": "system", "content": system}] if system else []
    return from_messages(tokenizer, [*before, {"role": "user", "content": text}])


def with_holes(tokenizer: TextTokenizer, prompt: Prompt, answer: str) -> Prompt:
    """``prompt`` followed by a partial answer: in ``answer``, ``<mask:N>`` marks N tokens to fill in.

    A hole sees the text before it and the rest of its own block, like all text of a block model.

    Raises:
        ValueError: no hole, or an empty one.
    """
    parts = HOLE.split(answer)  # text, size, text, size, ..., text
    sizes = [int(size[:10]) for size in parts[1::2]]
    if not sizes or min(sizes) < 1 or sum(sizes) > MOST_MASKS:
        raise ValueError(f"--infill {answer[:80]!r}: mark each hole as <mask:N>, N tokens, in all 1 to {MOST_MASKS}")
    begun: list[int] = []
    found: list[tuple[str, int]] = []
    changed = prompt.changed
    for place, part in enumerate(parts):
        text = [] if place % 2 or not part else tokenizer.encode_within(part, rest=place > 0).tolist()
        ids = [tokenizer.mask_id] * int(part) if place % 2 else text
        found += [("" if place % 2 else part, len(ids))] if part else []
        spelled = b"".join(tokenizer.id_to_bytes(one) or b"" for one in text)
        changed = changed or ("" if place % 2 else changes(part, spelled))
        begun += ids
    ids = np.concatenate([prompt.ids, np.array(begun, dtype=np.int32)])
    return replace(prompt, ids=ids, begun=len(begun), holes=sum(sizes), parts=tuple(found), changed=changed)


def read_prompts(path: str | Path, tokenizer: TextTokenizer, limit: int = 0) -> list[Prompt]:
    """JSONL: one object per line with ``messages`` (chat format) or ``prompt`` (text); the first ``limit`` (0: all).
    Rows that are none are left out and told.

    Raises:
        ValueError: naming file and line: too many of them (``check_bad``), or no prompt.
    """
    bad: list[str] = []
    rows = good_rows(read_rows(Path(path), bad), bad, partial(_from_row, tokenizer))
    prompts = list(islice(rows, limit or None))
    check_bad(bad, len(prompts))
    if not prompts:
        raise ValueError(f'{path}: holds no prompt; give lines such as {{"prompt": "Hello"}}')
    return prompts


def _from_row(tokenizer: TextTokenizer, row: dict[str, Any], where: str) -> Prompt:
    if row.get("system") or (row.get("prompt") and row.get("messages")):
        unread = "system" if row.get("system") else "messages beside prompt"
        raise ValueError(f"{where}: {unread} would be left out; put all of it in messages alone")
    if isinstance(row.get("prompt"), str):
        row = {**row, "messages": [{"role": "user", "content": row["prompt"]}]}
    if "messages" not in row:
        raise ValueError(f"{where}: needs messages or prompt")
    return from_messages(tokenizer, conversation(row, "messages", where))


def from_prepared(data: PreparedData, tokenizer: TextTokenizer, limit: int = 0, role: str = "student") -> list[Prompt]:
    """Prompts of prepared data's ``role`` half (student or teacher), evenly spaced; recorded responses are references.

    Raises:
        ValueError: when the data was prepared with another tokenizer or chat template.
    """
    if data.manifest[role]["fingerprint"] != tokenizer.fingerprint:
        raise ValueError(f"{data.folder}: prepared with another tokenizer than {tokenizer.name}; use that one's model")
    data.check_template(role, tokenizer.template_fingerprint)
    count = min(limit, len(data)) if limit > 0 else len(data)
    prompts = []
    for index in np.arange(count) * len(data) // count:
        side = getattr(data.sample(int(index)), role)
        ids, response = side.ids[: side.prompt], side.ids[side.prompt : side.content_end + 1]
        prompts.append(Prompt(np.array(ids), tokenizer.decode(ids), tokenizer.decode(response)))
    return prompts


def tell_changes(prompts: Sequence[Prompt]) -> None:
    """One line on stderr where a tokenizer changes texts before the model reads them."""
    changed = [prompt.changed for prompt in prompts if prompt.changed]
    if changed:
        many = f"{len(changed)} of {len(prompts)} prompts"
        say(f"note: the tokenizer changes the text of {many} before the model reads it: {changed[0]}", file=sys.stderr)


def print_answer(
    tokenizer: TextTokenizer, prompt: Prompt, answer: Completion, title: str, with_reference: bool
) -> None:
    """A prompt and its answer; before it the recorded answer, ``with_reference``."""
    say(f"--- {title}\n{prompt.shown.strip()}")
    if with_reference and prompt.reference is not None:
        say(f"--- reference\n{prompt.reference.rstrip()}")
    cut = not answer.finished and not prompt.begun
    text = prompt.answer(tokenizer, answer).rstrip()
    say(f"--- answer{' (cut at --max-new-tokens)' if cut else ''}\n{text}\n", flush=True)
