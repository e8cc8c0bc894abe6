"""Chat templates are programs of a model's folder: they are rendered in a process of their own, with limits.

The process (``template_worker.py``) starts with the first rendering, serves all templates, and ends with this one.
Whatever a template does there (loops that do not end, gigabytes of text, an error of any type) becomes one line here.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_tide.bridge.template_worker import SECONDS, SIZE

WORKER = Path(__file__).with_name("template_worker.py")
_PIPE = 1 << 15  # bytes that a pipe takes at once
MARKS_OF_THOUGHTS = {  # around what a model writes before it answers: Qwen3 and DeepSeek, Seed, Mistral, Cohere, Kimi
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
}
_MARKUP = re.compile(r"[<\[]\S+[>\]]")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateLimit(ValueError):
    """A chat template that takes more time or memory than any conversation of that size needs."""


def render(template: str, messages: list[Any], **names: Any) -> str:
    """``messages`` as transformers renders them with ``template``; ``names``: what else the template sees.

    Raises:
        TemplateLimit: rendering takes too much time or memory.
        ValueError: the template rejects the conversation, or cannot be rendered.
    """
    return _text(_RENDERER.ask(_request(template, messages, names)))


def render_all(template: str, conversations: Sequence[tuple[list[Any], dict[str, Any]]]) -> list[str | ValueError]:
    """``render`` of each (messages, names), in much less time; its error in place of a text."""
    found: list[str | ValueError] = []
    asked: dict[int, bytes] = {}
    for number, (messages, names) in enumerate(conversations):
        try:
            asked[number] = _request(template, messages, names)
            found.append("")
        except ValueError as error:
            found.append(error)
    for number, answer in zip(asked, _RENDERER.ask_all([*asked.values()])):
        try:
            found[number] = _text(answer)
        except ValueError as error:
            found[number] = error
    return found


def tokens_of_turns(template: str | None, tokens: Iterable[str], names: Mapping[str, Any]) -> set[str]:
    """Those of a vocabulary's added ``tokens`` that the template writes around what is said, in any conversation, such
    as ``<start_of_turn>``: control tokens, whatever the vocabulary calls them. Thoughts, calls of tools and other
    markup are text, which a message may have.
    """
    found = [one for one in tokens if _MARKUP.fullmatch(one) and one in (template or "")]
    candidates = set(found) - {*MARKS_OF_THOUGHTS, *MARKS_OF_THOUGHTS.values()}
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    for messages in (talk, talk[:1]) if candidates else ():
        try:
            text = render(template or "", messages, **names, add_generation_prompt=True)
        except ValueError:  # a template that wants something else
            continue
        return {one for one in candidates if one in text}
    return set()


def _request(template: str, messages: list[Any], names: Mapping[str, Any]) -> bytes:
    seen = {"tools": None, "documents": None, **names, "messages": [_with_reasoning(one) for one in messages]}
    if seen["tools"] is not None and not all(isinstance(tool, dict) for tool in _items(seen["tools"])):
        raise ValueError("tools must be a list of objects")
    try:
        return json.dumps({"template": template, "names": seen}, default=_named, skipkeys=True).encode()
    except RecursionError:
        raise ValueError("the conversation is nested too deeply") from None


def _text(found: Mapping[str, str]) -> str:
    if "text" in found:
        return found["text"]
    line = " ".join(found.get("limit", found.get("error", "")).split())[:300]
    raise TemplateLimit(f"{line}; use another template") if "limit" in found else ValueError(line)


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _named(value: object) -> str:
    """What a template sees of a value that is not JSON, such as an image."""
    return f"<{type(value).__name__}>"


def _with_reasoning(message: Any) -> Any:
    """``message``, its reasoning under the names that templates read, whichever it has."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message must be an object, not {type(message).__name__}")
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _environment() -> dict[str, str]:
    """What decides how Python starts: the process that renders gets no token of the user's."""
    starts = ("PATH", "PYTHON", "LD_", "DYLD_", "LANG", "LC_", "VIRTUAL_ENV", "CONDA_PREFIX", "SYSTEMROOT")
    return {name: value for name, value in os.environ.items() if name.startswith(starts) and "TOKEN" not in name}


class _Renderer:
    """The process that renders: started when it is needed, and again after it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        status = 0
        with self._lock:
            for _ in range(2):  # the process may have been ended from outside since the last request
                try:
                    self._send(request)
                    return next(self._answers(1))
                except (OSError, EOFError):
                    status = self._stop()
                    if status == -signal.SIGPROF:
                        return {"limit": f"it takes more than {SECONDS:g} s"}
        return {"limit": f"the process that renders it ends (status {status})"}

    def ask_all(self, requests: Sequence[bytes]) -> list[dict[str, str]]:
        """Answers to several requests: as many as fit into a pipe are sent together."""
        found: list[dict[str, str]] = []
        while len(found) < len(requests):
            rest = requests[len(found) :]
            count = sum(size <= _PIPE for size in accumulate(SIZE + len(request) for request in rest))
            together = self._together(rest[:count]) if count > 1 else []
            found += together or [self.ask(rest[0])]
        return found

    def _together(self, requests: Sequence[bytes]) -> list[dict[str, str]]:
        """Answers up to the first one that ended the process."""
        found: list[dict[str, str]] = []
        with self._lock:
            try:
                self._send(*requests)
                found.extend(self._answers(len(requests)))
            except (OSError, EOFError):
                self._stop()
        return found

    def forget(self) -> None:
        """In a forked process: the parent's process is not ours."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process else ():
            assert pipe is not None
            pipe.close()

    def close(self) -> None:
        self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(WORKER)]  # -P: modules beside it have names of the standard library's
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, **pipes, bufsize=0, env=_environment())

    def _stop(self) -> int:
        process, self._process = self._process, None
        if process is None:  # it could not be started
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        try:
            return process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _send(self, *requests: bytes) -> None:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        data = memoryview(b"".join(len(request).to_bytes(SIZE, "big") + request for request in requests))
        while data:
            data = data[process.stdin.write(data) :]

    def _answers(self, count: int) -> Iterator[dict[str, str]]:
        assert self._process is not None
        process, data = self._process, b""
        for _ in range(count):
            while len(data) < SIZE:
                data += self._read(process)
            parts, size = [data[SIZE:]], int.from_bytes(data[:SIZE], "big")
            left = size - len(parts[0])
            while left > 0:
                parts.append(self._read(process))
                left -= len(parts[-1])
            joined = b"".join(parts)
            data = joined[size:]
            found: dict[str, str] = json.loads(joined[:size])
            if "limit" in found:
                self._stop()
            yield found
            if "limit" in found:
                return

    def _read(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout is not None
        part = process.stdout.read(1 << 20)
        if not part:
            raise EOFError
        return part


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
os.register_at_fork(after_in_child=_RENDERER.forget)
