"""The sandbox worker: two processes that give up their rights, then run a program and its checks. See ``run``.

It starts with a JSON order on standard input, and imports nothing but the standard library and what lies here.
"""

from __future__ import annotations

import builtins
import functools
import json
import os
import socket
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

from .messages import Channel, Failed, Function, decode, encode
from .rights import confine

ASKED: dict[str, Callable[..., Any]] = {
    "call": lambda function, args, options: function(*args, **options),
    "get": getattr,
    "set": setattr,
    "list": list,
    "truth": bool,
}


class Refused(Exception):
    """A protection that this machine does not provide."""


def main() -> None:
    """Read the order; a process of its own serves as the program, and this one then reads the checks and runs them."""
    order = json.loads(b"".join(iter(lambda: os.read(0, 1 << 20), b"")))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    order["missing"] = confine(order, shared=True)
    judge, program, checks = os.getpid(), *socket.socketpair()
    number = os.fork()
    if not number:
        for one in (checks.detach(), order["checks"], order["result"]):
            os.close(one)
        _serve(order | {"parent": judge}, Channel(program.detach()))
    for one in (program.detach(), order.pop("control")):
        os.close(one)
    channel = Channel(checks.detach())
    with os.fdopen(order["checks"]) as file, channel.reading:
        said = _judge(order | json.load(file), channel)
    if not said:  # the program's exit status says why
        said = f"ended {os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])}"
    os.write(order["result"], said.encode("utf-8", "replace"))


def _serve(order: dict[str, Any], channel: Channel) -> NoReturn:
    """Run the program, then do what the checks ask of it; each answer is [value] or what went wrong."""
    module = types.ModuleType("program")
    namespace, held = module.__dict__, list[Any]()

    def found(reference: str | int) -> Any:
        return held[reference] if isinstance(reference, int) else eval(reference, namespace)

    def keep(value: Any) -> list[Any]:
        held.append(value)
        return ["object", len(held) - 1]

    def run() -> None:
        _confine_or_refuse(order)
        sys.path.extend(order["packages"])
        sys.modules["program"] = module
        exec(compile(order["program"], "<program>", "exec"), namespace)

    asked = run
    while True:
        try:
            channel.send([encode(asked(), keep)])
        except Refused as error:
            channel.send(f"sandbox: {error}")
        except BaseException as error:  # SystemExit and KeyboardInterrupt end a program early: it did not pass
            channel.send(f"{type(error).__name__}: {str(error)[:200]}")
        asked = functools.partial(_do, *channel.receive(), found=found)


def _do(what: str, *messages: Any, found: Callable[[str | int], Any]) -> Any:
    """What the checks ask for: a key of ``ASKED``, and the values for it."""
    return ASKED[what](*(decode(message, found) for message in messages))


def _judge(order: dict[str, Any], channel: Channel) -> str:
    """Run the checks; how it went, "" where the program ended."""
    try:
        _confine_or_refuse(order)
        sys.path.extend(order["packages"])
        channel.answer()  # the program has run
        names: dict[str, Any] = {name: Function(channel, name) for name in order["tested"]}
        names |= {"__builtins__": builtins, "__name__": "checks"}
        for number, check in enumerate(order["checks"]):
            exec(compile(check, f"<check {number}>", "exec"), names)
    except Refused as error:
        return f"failed: sandbox: {error}"
    except Failed as error:
        return f"failed: {error}" if str(error) else ""
    except BaseException as error:
        return f"failed: {type(error).__name__}: {str(error)[:200]}"
    return "passed"


def _confine_or_refuse(order: dict[str, Any]) -> None:
    missing = order["missing"] + confine(order, shared=False)
    if missing and order["strict"]:
        raise Refused("; ".join(missing))
