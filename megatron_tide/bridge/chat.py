"""What a chat template rendered: which parts are the messages' own text, and what it left out.

A control token in a prompt comes from the template alone. Where a message contains the string of one, the template is
rendered a second time with a private-use character in that string's place; where the character comes out, text is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Range = tuple[int, int]
SPOKEN = ("content", "reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
"""Fields of a message that hold something said: a template that leaves one out changes the conversation."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_PRIVATE = range(0xF0000, 0xFFFFE)
_NOT_SAID = ("id", "type", "index")  # of a tool call


class LeftOut(ValueError):
    """The chat template does not write something that a message says."""


class Rendered(str):
    """A rendered conversation. ``content``: ranges of characters that read like control tokens and are message text."""

    content: tuple[Range, ...]

    def __new__(cls, text: str, content: tuple[Range, ...] = ()) -> Rendered:
        rendered = super().__new__(cls, text)
        rendered.content = content
        return rendered

    def __add__(self, text: str) -> Rendered:
        return Rendered(f"{self}{text}", self.content)


def render_guarded(
    messages: list[Any], render: Callable[[list[Any]], str], controls: Callable[[str], list[Range]]
) -> Rendered:
    """``render(messages)``, and where message text in it reads like a control token.

    ``controls``: the ranges of a text that would become control tokens. ValueError where the template changes such
    text.
    """
    plain = render(messages)
    marks: dict[str, str] = {}

    def mark(text: str) -> str:
        parts, end = [], 0
        for start, stop in controls(text):
            string = text[start:stop]
            if string not in marks:
                taken = set(plain).union(marks.values(), *_strings(messages))
                marks[string] = next(chr(code) for code in _PRIVATE if chr(code) not in taken)
            parts += [text[end:start], marks[string]]
            end = stop
        return "".join([*parts, text[end:]])

    marked = _mapped(messages, mark)
    if not marks:
        return Rendered(plain)
    strings = {letter: string for string, letter in marks.items()}
    parts: list[str] = []
    content: list[Range] = []
    place = 0
    for letter in render(marked):
        parts.append(strings.get(letter, letter))
        if letter in strings:
            content.append((place, place + len(parts[-1])))
        place += len(parts[-1])
    if "".join(parts) != plain:
        raise ValueError(f"the chat template changes {next(iter(marks))!r} in a message; take it out of the text")
    return Rendered(plain, tuple(content))


def check_said(messages: list[dict[str, Any]], rendered: str, shown: Callable[[list[Any]], str]) -> None:
    """LeftOut where something that a message says is not in ``rendered``.

    ``shown`` renders a conversation of the same roles: a short text may be in ``rendered`` by chance, a mark cannot.
    Thoughts of an assistant's earlier turns may be left out: templates of reasoning models do so on purpose.
    """
    marked = [{**one, "content": chr(_PRIVATE[n])} if _text(one) else one for n, one in enumerate(messages)]
    try:
        marks = shown(marked)
    except ValueError:
        marks = "".join(chr(_PRIVATE[n]) for n in range(len(messages)))  # a template that looks at the text
    for number, message in enumerate(messages):
        earlier = message.get("role") == "assistant" and number < len(messages) - 1
        for field in SPOKEN:
            said = [] if earlier and field in THOUGHTS else [*_said(message.get(field))]
            if earlier:
                said = [text.rpartition("</think>")[2] for text in said]
            lost = [text for text in said if not _found(text, rendered)]
            if field == "content" and _text(message) and chr(_PRIVATE[number]) not in marks:
                lost = [_text(message)]
            if lost:
                raise LeftOut(
                    f"the chat template leaves out {lost[0].strip()[:40]!r}, {field} of message {number} "
                    f"(role {message.get('role')!r})"
                )
    given = [message["tools"] for message in messages if message.get("tools")]
    for tool in [one for tools in given for one in (tools if isinstance(tools, list) else [tools])]:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in rendered:
            raise LeftOut(f"the chat template leaves out the tool {str(name)[:40]!r}")


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _found(text: str, rendered: str) -> bool:
    text = text.strip()
    return text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered


def _said(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _NOT_SAID}
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _said(item)
    elif isinstance(value, str):
        yield value


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from _strings(pair)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
