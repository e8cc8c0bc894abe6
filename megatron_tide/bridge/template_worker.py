"""The process that renders chat templates: jinja2 and the standard library alone, with limits of time and memory.

Run as a program by ``template.py``. Requests and answers are JSON, each behind its length in 8 bytes. Names and filters
are those that transformers gives a template.
"""

from __future__ import annotations

import contextlib
import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

SIZE = 8
SECONDS = 3.0
"""Of the processor, and one more for each million bytes of a request."""
MEMORY = 1 << 29
"""Bytes; and ``TIMES`` those of a request."""
TEXT = 1 << 22
"""Characters of a rendered text; and ``TIMES`` the bytes of a request."""
TIMES = 32


class Generation(Extension):
    """``{% generation %}``, which marks what an assistant says; its content is written as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        return caller()


class Variables(Namespace):
    """Jinja's ``namespace``, without names that begin with an underscore."""

    def __init__(*args: Any, **named: Any) -> None:
        for name in dict(*args[1:], **named):
            _check_name(name)
        Namespace.__init__(*args, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **named: Any) -> dict[Any, Any]:
    return dict(*args, **named)


@functools.lru_cache(maxsize=16)
def compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime}
    environment.globals |= {"dict": _dict, "namespace": Variables}
    return environment.from_string(template)


def answer(request: bytes) -> dict[str, str]:
    """``text``; or ``error``; or ``limit``, what the template exceeds."""
    try:
        asked = json.loads(request)
        text = compiled(asked["template"]).render(asked["names"])
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"limit": f"it needs more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    most = TEXT + TIMES * len(request)
    return {"text": text} if len(text) <= most else {"limit": f"it writes more than {most} characters"}


def limit(size: int) -> None:
    """Bound the processor's time (SIGPROF ends the process) and the memory for a request of ``size`` bytes."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS + size * 1e-6)
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = MEMORY + TIMES * max(size, 1 << 20)
    if before == soft:
        return
    with contextlib.suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a parent may have it ignored or blocked, which is inherited
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    read, write = sys.stdin.buffer, sys.stdout.buffer
    while size := read.read(SIZE):
        limit(int.from_bytes(size, "big"))
        found = answer(read.read(int.from_bytes(size, "big")))
        reply = json.dumps(found).encode()
        write.write(len(reply).to_bytes(SIZE, "big") + reply)
        write.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        if "limit" in found:
            return


if __name__ == "__main__":
    main()
