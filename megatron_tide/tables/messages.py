"""A row's conversation: what is read of each message, and what is refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from typing import Any

Message = dict[str, Any]
ASSISTANT = "assistant"
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
FIELDS = (*THOUGHTS, "tool_calls", "function_call", "tool_call_id", "name", "tools", "refusal")
"""Keys of a message beside role and content that chat templates write."""
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
"""Keys of a message, and columns beside it, for what is no text: no template here writes it."""
AS_WRITTEN = "as_written"
"""Key of a message for its tokens as a student wrote them (``SourceSpec.written_column``); none of a file has it."""
BESIDE = ("tools", *MEDIA)
"""Columns that belong to a conversation in another one."""
_ELSEWHERE = ("text", "value", "parts")  # where other formats have what a message says
_TEXTS = ("text", "input_text", "output_text")  # types of a part of a content that is text

LONGEST_TEXT = 1 << 20
"""Characters of one text, and of the messages of a row: tokenizers take minutes for longer ones, or fail."""


def parse_messages(value: Any, where: str) -> list[Message]:
    """Check one ``messages`` value: a list of {"role": str, "content": str}.

    Content may be a list of {"type": "text", "text": str} parts, which are joined; null counts as empty. Of the other
    keys, those of ``FIELDS`` that hold something are kept for the chat template. ValueError naming ``where`` (file and
    row) otherwise.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    messages = []
    for number, message in enumerate(value):
        role, content = message.get("role"), _text(message.get("content"))
        if not isinstance(role, str) or content is None:
            raise ValueError(f"{where}: message {number}: role and content must be text")
        elsewhere = [] if content.strip() else [name for name in _ELSEWHERE if message.get(name)]
        if elsewhere:
            raise ValueError(f"{where}: message {number}: its text is in {elsewhere[0]!r}; it must be in 'content'")
        kept = {field: message[field] for field in (*FIELDS, *MEDIA) if message.get(field)}
        messages.append({"role": role, "content": content, **kept})
    _check_length([one for message in messages for name, one in message.items() if name not in MEDIA], where)
    return messages


def _check_length(written: Iterable[Any], where: str) -> None:
    """ValueError where all that a template might write is more than ``LONGEST_TEXT``."""
    with contextlib.suppress(RecursionError):  # of a value nested too deeply, which no template writes
        if sum(len(one if isinstance(one, str) else str(one)) for one in written) <= LONGEST_TEXT:
            return
    raise ValueError(f"{where}: messages of more than {LONGEST_TEXT:,} characters; split or remove them")


def conversation(row: dict[str, Any], column: str, where: str) -> list[Message]:
    """The messages in a row's ``column``; the first also has the row's ``tools``, and pictures and sound beside it."""
    messages = parse_messages(row[column], where)
    more = {"tools": _listed(row.get("tools"))}
    _check_length(more.values(), where)
    more |= {name: row.get(name) for name in MEDIA if not isinstance(row.get(name), str)}  # text only tells of one
    for message in messages[:1]:
        message |= {name: value for name, value in more.items() if value}
    return messages


def _listed(tools: Any) -> Any:
    """The tools of a row, which many data sets hold as JSON text."""
    try:
        return json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        return tools


def _text(content: Any) -> str | None:
    """Text of a message's content; None if it is not text (an image part, a number)."""
    if isinstance(content, list):
        known = (part for part in content if isinstance(part, dict) and part.get("type", "text") in _TEXTS)
        parts = [part.get("text") for part in known]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(content) else None
    return content if isinstance(content, str) else "" if content is None else None
