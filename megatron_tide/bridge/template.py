"""Chat templates are programs of a model's folder: they are rendered in a process of their own, with limits.

The process (``template_worker.py``) starts with the first rendering, serves all templates, and ends with this one.
Whatever a template does there (loops that do not end, gigabytes of text, an error of any type) becomes one line here.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tide.bridge.template_worker import SECONDS, SIZE

WORKER = Path(__file__).with_name("template_worker.py")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateLimit(ValueError):
    """A chat template that takes more time or memory than any conversation of that size needs."""


def render(template: str, messages: list[Any], **names: Any) -> str:
    """``messages`` as transformers renders them with ``template``; ``names``: what else the template sees.

    Raises:
        TemplateLimit: rendering takes too much time or memory.
        ValueError: the template rejects the conversation, or cannot be rendered.
    """
    seen = {"tools": None, "documents": None, **names, "messages": [_with_reasoning(one) for one in messages]}
    if seen["tools"] is not None and not all(isinstance(tool, dict) for tool in _items(seen["tools"])):
        raise ValueError("tools must be a list of objects")
    try:
        request = json.dumps({"template": template, "names": seen}, default=_named, skipkeys=True).encode()
    except RecursionError:
        raise ValueError("the conversation is nested too deeply") from None
    found = _RENDERER.ask(request)
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


class _Renderer:
    """The process that renders: started when it is needed, and again after it ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes) -> dict[str, str]:
        with self._lock:
            for _ in range(2):  # the process may have been ended from outside since the last request
                process = self._process = self._process or self._start()
                try:
                    return self._exchange(process, request)
                except (OSError, EOFError):
                    status = self._stop()
                    if status == -signal.SIGPROF:
                        return {"limit": f"it takes more than {SECONDS:g} s"}
            return {"limit": f"the process that renders it ends (status {status})"}

    def forget(self) -> None:
        """In a forked process: the parent's process is not ours."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process else ():
            assert pipe is not None
            pipe.close()

    def close(self) -> None:
        if self._process is not None:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", str(WORKER)]  # -P: modules beside it have names of the standard library's
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, **pipes, bufsize=0)

    def _stop(self) -> int:
        process, self._process = self._process, None
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()
        try:
            return process.wait(1.0)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _exchange(self, process: subprocess.Popen[bytes], request: bytes) -> dict[str, str]:
        assert process.stdin is not None
        data = memoryview(len(request).to_bytes(SIZE, "big") + request)
        while data:
            data = data[process.stdin.write(data) :]
        size = int.from_bytes(self._read(process, SIZE), "big")
        found: dict[str, str] = json.loads(self._read(process, size))
        if "limit" in found:
            self._stop()
        return found

    def _read(self, process: subprocess.Popen[bytes], size: int) -> bytes:
        assert process.stdout is not None
        parts = []
        while size:
            parts.append(process.stdout.read(size))
            if not parts[-1]:
                raise EOFError
            size -= len(parts[-1])
        return b"".join(parts)


_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
os.register_at_fork(after_in_child=_RENDERER.forget)
