"""The sandbox worker: an interpreter that gives up its rights, then runs a program, or the checks of one. See ``run``.

It starts with a JSON order on standard input, and imports nothing but the standard library and what lies here.
"""

from __future__ import annotations

import builtins
import functools
import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

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
    """Read the order, give up the rights, serve as the program or run its checks."""
    order = json.loads(b"".join(iter(lambda: os.read(0, 1 << 20), b"")))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    channel = Channel(order["channel"])
    (_serve if "program" in order else _judge)(order, channel)


def _serve(order: dict[str, Any], channel: Channel) -> None:
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


def _judge(order: dict[str, Any], channel: Channel) -> None:
    """Run the checks, and say on the result pipe how it went; nothing is said where the program's end says it."""
    try:
        _confine_or_refuse(order)
        sys.path.extend(order["packages"])
        channel.answer()  # the program has run
        names: dict[str, Any] = {name: Function(channel, name) for name in order["tested"]}
        names |= {"__builtins__": builtins, "__name__": "checks"}
        for number, check in enumerate(order["checks"]):
            exec(compile(check, f"<check {number}>", "exec"), names)
        said = "passed"
    except Refused as error:
        said = f"failed: sandbox: {error}"
    except Failed as error:
        said = f"failed: {error}" if str(error) else ""
    except BaseException as error:
        said = f"failed: {type(error).__name__}: {str(error)[:200]}"
    os.write(order["result"], said.encode("utf-8", "replace"))


def _confine_or_refuse(order: dict[str, Any]) -> None:
    missing = confine(order)
    if missing and order["strict"]:
        raise Refused("; ".join(missing))
