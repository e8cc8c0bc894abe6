"""A conversation -> the prompt and the response that is learned."""

from __future__ import annotations

from typing import Any

Message = dict[str, str]

ASSISTANT = "assistant"
NO_ASSISTANT = "no assistant turn"
EMPTY_PROMPT = "nothing before the response"
EMPTY_RESPONSE = "empty response"


def split_response(messages: list[Message]) -> tuple[list[Message], str] | str:
    """The messages before the last assistant turn and that turn's text; or, as a string, why the row has none.

    What follows the last assistant turn is not used. Earlier assistant turns are part of the prompt.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not turns:
        return NO_ASSISTANT
    prompt, response = messages[: turns[-1]], messages[turns[-1]]["content"]
    if not prompt:
        return EMPTY_PROMPT
    if not response.strip():
        return EMPTY_RESPONSE
    return prompt, response


def parse_messages(value: Any, where: str) -> list[Message]:
    """Check one ``messages`` value: a list of {"role": str, "content": str}. A null content counts as empty.

    ValueError naming ``where`` (file and row) otherwise. Other keys of a message are left out.
    """
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    messages = []
    for number, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise ValueError(f"{where}: message {number} needs a role and a content that are texts")
        messages.append({"role": role, "content": content or ""})
    return messages
