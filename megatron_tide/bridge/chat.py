"""What a chat template rendered: which parts are the messages' own text, and what it left out.

A control token in a prompt comes from the template alone. Where a message contains the string of one, or begins or
ends like one (``<|im_`` before the template's ``end|>``), the template is rendered a second time with a rare letter in
place of that part; where the letter comes out, text is.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, Protocol

from megatron_tide.bridge.template import MARKS_OF_THOUGHTS, TemplateLimit
from megatron_tide.tables import MEDIA, THOUGHTS

Range = tuple[int, int]
SPOKEN = ("content", *THOUGHTS, "tool_calls", "function_call", "refusal", "name")
"""Fields of a message that hold something said: a template that leaves one out changes the conversation."""
TOOLS = ("tool", "function")  # roles whose name is that of a tool, which mostly its call has said
_RARE = range(0x20000, 0x2A6E0)
"""Letters that stand for parts of messages: without cases or composition, printed as they are, in hardly any text."""
BLANK = "\ue000"  # a private-use character that is in no vocabulary
_NOT_SAID = ("id", "type", "index")  # of a tool call


class LeftOut(ValueError):
    """The chat template does not write something that a message says."""


class Rendered(str):
    """A rendered conversation. ``content``: ranges of characters that are message text, where it reads like control
    tokens, alone or together with what stands beside it. Text added to it is text; slices keep their part.
    """

    content: tuple[Range, ...]

    def __new__(cls, text: str, content: tuple[Range, ...] = ()) -> Rendered:
        rendered = super().__new__(cls, text)
        rendered.content = content
        return rendered

    def __add__(self, text: str) -> Rendered:
        return Rendered(f"{self}{text}", (*self.content, *_shifted(_content(text), len(self))))

    def __radd__(self, text: str) -> Rendered:
        return Rendered(f"{text}{self}", (*_content(text), *_shifted(self.content, len(text))))

    def __getitem__(self, key: Any) -> str:
        found = super().__getitem__(key)
        if not isinstance(key, slice) or key.step not in (None, 1):
            return found
        first = key.indices(len(self))[0]
        ranges = ((max(0, start - first), min(len(found), stop - first)) for start, stop in self.content)
        return Rendered(found, tuple(one for one in ranges if one[0] < one[1]))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(super().rstrip(chars))]

    def strip(self, chars: str | None = None, /) -> str:
        return self.rstrip(chars).lstrip(chars)


def _content(text: str) -> tuple[Range, ...]:
    return text.content if isinstance(text, Rendered) else ((0, len(text)),) if text else ()


def _shifted(content: tuple[Range, ...], by: int) -> tuple[Range, ...]:
    return tuple((start + by, stop + by) for start, stop in content)


class Guard(Protocol):
    """What knows a tokenizer's control tokens."""

    def controls(self, text: str) -> list[Range]:
        """The ranges of ``text`` that a prompt makes control tokens of."""

    def edges(self, text: str) -> list[Range]:
        """The first and the last letter of ``text``, where it may be part of a control token with text beside it."""


def render_guarded(
    messages: list[Any], plain: str, render: Callable[[list[Any]], str], guard: Guard, known: Container[str]
) -> Rendered:
    """``plain``, which is ``render(messages)``, and where message text in it reads like a control token, or completes
    one.

    ``known``: words that the template itself uses, such as names of roles and fields. ValueError where the template
    changes such text.
    """
    marks = _Marks(guard, known, _free(plain, messages))
    marked = _mapped(messages, marks.all)
    if not marks.strings:
        return Rendered(plain)
    with_edges = _try(render, marked)
    if with_edges is not None:
        text, content = marks.expand(with_edges)
        if text == plain:
            return Rendered(plain, content)
    # A template that looks at the first or the last letters of a message: their tokens must be its own all the same.
    whole = _mapped(messages, marks.whole)
    text, content = marks.expand(plain if whole == messages else render(whole))
    if text != plain:
        string = next(string for string in marks.strings if guard.controls(string))
        raise ValueError(f"the chat template changes {string!r} in a message; take it out of the text")
    own = [] if with_edges is None else [with_edges[start:stop] for start, stop in guard.controls(with_edges)]
    hidden = blank(plain, content)
    if [hidden[start:stop] for start, stop in guard.controls(hidden)] != own:
        raise ValueError("a message and the chat template's text form a control token together; change the message")
    return Rendered(plain, content)


def _free(plain: str, messages: list[Any]) -> Iterator[str]:
    """Rare letters that occur nowhere; nothing is looked through before the first one is asked for."""
    taken = set(plain).union(*_strings(messages))
    yield from (letter for code in _RARE if (letter := chr(code)) not in taken)


def blank(text: str, content: Sequence[Range]) -> str:
    """``text`` with a letter of no control token in place of each of ``content``'s."""
    parts, place = [], 0
    for start, stop in sorted(content):
        parts += [text[place:start], BLANK * (stop - max(start, place))]
        place = max(place, stop)
    return "".join([*parts, text[place:]])


class _Marks:
    """Rare letters in place of parts of messages. ``strings``: the letter of each part."""

    def __init__(self, guard: Guard, known: Container[str], letters: Iterator[str]) -> None:
        self._guard, self._known, self._letters = guard, known, letters
        self.strings: dict[str, str] = {}

    def all(self, text: str) -> str:
        """``text``, its control tokens and its edges marked."""
        found = self._guard.controls(text)
        edges = [] if text in self._known else self._guard.edges(text)
        free = [one for one in edges if not any(start < one[1] and one[0] < stop for start, stop in found)]
        return self._mark(text, sorted([*found, *free]))

    def whole(self, text: str) -> str:
        """``text``, its control tokens marked."""
        return self._mark(text, self._guard.controls(text))

    def _mark(self, text: str, ranges: list[Range]) -> str:
        parts, end = [], 0
        for start, stop in ranges:
            string = text[start:stop]
            if string not in self.strings:
                letter = next(self._letters, None)
                if letter is None:
                    raise ValueError("the conversation has all letters of a plane of Unicode; remove some")
                self.strings[string] = letter
            parts += [text[end:start], self.strings[string]]
            end = stop
        return "".join([*parts, text[end:]])

    def expand(self, marked: str) -> tuple[str, tuple[Range, ...]]:
        """The text behind the marks, and the ranges of the marked parts in it."""
        strings = {letter: string for string, letter in self.strings.items()}
        parts: list[str] = []
        content: list[Range] = []
        place = 0
        for part in re.split(f"([{''.join(strings)}])", marked):
            parts.append(strings.get(part, part))
            if part in strings:
                content.append((place, place + len(parts[-1])))
            place += len(parts[-1])
        return "".join(parts), tuple(content)


def _try(render: Callable[[list[Any]], str], messages: list[Any]) -> str | None:
    try:
        return render(messages)
    except TemplateLimit:
        raise
    except ValueError:
        return None


def check_said(
    messages: list[dict[str, Any]], rendered: str, shown: Callable[[list[Any]], str], known: Container[str]
) -> None:
    """LeftOut where something that a message says is not in ``rendered``.

    ``shown`` renders a conversation of the same roles: a short text may be in ``rendered`` by chance, a mark cannot.
    Thoughts of an assistant's earlier turns may be left out by a template that knows of thoughts (``known``: the words
    that it uses), as those of reasoning models do on purpose; within a text, by one that knows the mark at their end.
    A text that several messages have, also as a part, is looked for as often.
    """
    knows_thoughts = any(word in known for word in (*THOUGHTS, *MARKS_OF_THOUGHTS.values()))
    if 8 * len(messages) > len(_RARE):
        raise ValueError(f"a conversation of {len(messages)} messages, more than {len(_RARE) // 8}")
    marked = _marked(messages)
    marks = _try(shown, marked)  # None: a template that looks at the text
    repeated = _lost_repeats(messages, shown)
    earlier = [one.get("role") == "assistant" and number < len(messages) - 1 for number, one in enumerate(messages)]
    contents = [[*_contents(message, silent, known)] for message, silent in zip(messages, earlier)]
    everything = "\0".join(text.strip() for texts in contents for text in texts)
    for number, message in enumerate(messages):
        for field in SPOKEN:
            silent = earlier[number] and field in THOUGHTS and knows_thoughts
            silent = silent or (field == "name" and _names_its_call(message, messages[:number]))
            said = [] if silent else [text for text in _said(message.get(field)) if text.strip()]
            said = contents[number] if field == "content" else said
            often = everything if field == "content" else ""
            lost = [text for text in said if not _found(text, rendered, max(1, often.count(text.strip())))]
            lost += said[:1] if field == "content" and _text(message, field) in repeated else []
            if marks is not None and said and not lost:
                letters = [one for one in _said(marked[number][field]) if one[:1] and ord(one[0]) in _RARE]
                lost = said[:1] if any(not _found(letter, marks) for letter in letters) else []
            if lost:
                raise LeftOut(
                    f"the chat template leaves out {lost[0].strip()[:40]!r}, {field} of message {number} "
                    f"(role {message.get('role')!r})"
                )
        for medium in MEDIA:
            if message.get(medium):
                raise LeftOut(f"the chat template leaves out {medium} of message {number}: only text is rendered")
    given = [message["tools"] for message in messages if message.get("tools")]
    for tool in [one for tools in given for one in (tools if isinstance(tools, list) else [tools])]:
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or name not in rendered or (marks is not None and not _has_tools(marked, marks)):
            raise LeftOut(f"the chat template leaves out the tool {str(name)[:40]!r}")


def _names_its_call(message: dict[str, Any], before: list[dict[str, Any]]) -> bool:
    """Whether a tool's answer has the name of a tool that a message before it has said."""
    name = message.get("name")
    return message.get("role") in TOOLS and isinstance(name, str) and any(name in one for one in _strings(before))


def _contents(message: dict[str, Any], earlier: bool, known: Container[str]) -> Iterator[str]:
    """The texts of a message's content; of an ``earlier`` answer those outside of thoughts."""
    for text in _said(message.get("content")):
        yield from (part for part in (_outside_thoughts(text, known) if earlier else [text]) if part.strip())


def _lost_repeats(messages: list[dict[str, Any]], shown: Callable[[list[Any]], str]) -> set[str]:
    """Contents of several messages that the template does not write as often, as one that leaves out repeats."""
    counts = Counter(filter(None, (_text(message, "content") for message in messages)))
    letters = {text: chr(_RARE[place]) for place, text in enumerate(counts)}
    if len(letters) == counts.total():
        return set()
    same = [{**one, "content": letters.get(_text(one, "content"), one.get("content"))} for one in messages]
    text = _try(shown, same)
    return {one for one in counts if text is not None and text.count(letters[one]) < counts[one]}


def _outside_thoughts(text: str, known: Container[str]) -> list[str]:
    """The parts of ``text`` before, between and behind thoughts in marks of which the end is ``known``. The first ones
    may have begun in the prompt.
    """
    parts = [text]
    for start, end in MARKS_OF_THOUGHTS.items():
        if end in known and any(end in part for part in parts):
            *heads, last = [piece for part in parts for piece in part.split(end)]
            split = [head.partition(start) for head in heads]
            parts = [before if begun or number else "" for number, (before, begun, _) in enumerate(split)] + [last]
    return parts


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with a rare letter of its own in place of what each says, of the names of tools and of calls."""
    kinds = ("content", "name", "refusal", "calls", "tools", "arguments")
    letters = {kind: map(chr, _RARE[start :: len(kinds)]) for start, kind in enumerate(kinds)}

    def named(tool: Any, kind: str) -> Any:
        if not isinstance(tool, dict):
            return tool
        if isinstance(tool.get("function"), dict):
            return {**tool, "function": named(tool["function"], kind)}
        new = {"name": next(letters[kind], BLANK)} if isinstance(tool.get("name"), str) else {}
        if kind == "calls" and tool.get("arguments"):
            new["arguments"] = _filled(tool["arguments"], next(letters["arguments"], BLANK))
        return {**tool, **new}

    found = []
    for message in messages:
        new: dict[str, Any] = {field: next(letters[field]) for field in kinds[:3] if _text(message, field)}
        for field, kind in (("tool_calls", "calls"), ("function_call", "calls"), ("tools", "tools")):
            value = message.get(field)
            if isinstance(value, list | dict) and value:
                new[field] = [named(one, kind) for one in value] if isinstance(value, list) else named(value, kind)
            elif _text(message, field):  # JSON
                new[field] = next(letters[kind], BLANK)
        found.append({**message, **new})
    return found


def _filled(value: Any, letter: str) -> Any:
    """``value`` with ``letter`` in place of its texts and numbers."""
    if isinstance(value, dict):
        return {key: _filled(item, letter) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(item, letter) for item in value]
    return value if value is None else letter


def _has_tools(marked: list[dict[str, Any]], shown: str) -> bool:
    tools = [message["tools"] for message in marked if message.get("tools")]
    return all(_found(one, shown) for one in _said(tools) if one[:1] and ord(one[0]) in _RARE)


def _text(message: dict[str, Any], field: str) -> str:
    text = message.get(field)
    return text.strip() if isinstance(text, str) else ""


def _found(text: str, rendered: str, times: int = 1) -> bool:
    """Whether ``rendered`` has a text this many times, in any of its forms."""
    if times == 1:
        return any(form in rendered for form in _forms(text.strip()))
    return sum(map(rendered.count, {*_forms(text.strip())})) >= times


def _forms(text: str) -> Iterator[str]:
    yield text
    for ascii in (False, True):
        yield json.dumps(text, ensure_ascii=ascii)[1:-1]


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
