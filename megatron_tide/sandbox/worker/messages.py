"""What a program and its checks say to each other: values, and names of what only the program has."""

from __future__ import annotations

import builtins
import json
import numbers
import os
import sys
from collections.abc import Callable, Iterator, Set
from typing import Any

MESSAGE_BYTES = 1 << 24  # the longest message
NUMPY_KINDS = "biufcSU"  # numbers and texts


class Failed(Exception):
    """How a program failed, in words; or that it said nothing any more ("")."""


class Channel:
    """The socket between a program and its checks: one JSON value a line, and nothing that either could run."""

    def __init__(self, descriptor: int) -> None:
        self.reading, self.writing = os.fdopen(descriptor, "rb"), os.fdopen(descriptor, "wb", closefd=False)

    def send(self, message: Any) -> None:
        """Write ``message``."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MESSAGE_BYTES:
            raise ValueError(f"an answer of {len(line):,} bytes is too long for its checks")
        self.writing.write(line)
        self.writing.flush()

    def receive(self) -> Any:
        """The next message.

        Raises:
            Failed: it is the end.
        """
        line = self.reading.readline(MESSAGE_BYTES)
        if not line.endswith(b"\n"):
            raise Failed("")
        return json.loads(line)

    def ask(self, what: str, *values: Any) -> Any:
        """What the program says to this."""
        try:
            self.send([what, *(encode(value, _reference) for value in values)])
            return self.answer()
        except OSError:
            raise Failed("") from None

    def answer(self) -> Any:
        """The program's answer.

        Raises:
            Failed: it did not give one.
        """
        match self.receive():
            case [value]:
                return decode(value, lambda number: Theirs(self, int(number)))
            case str(reason):
                raise Failed(reason[:300])
            case _:
                raise Failed("it wrote to the checks itself")


class Theirs:
    """An object of the program, known by a number: it equals nothing that the checks have. Its attributes, items and
    truth are the program's own.
    """

    def __init__(self, channel: Channel, reference: str | int) -> None:
        vars(self).update(channel=channel, reference=reference)

    def __getattr__(self, name: str) -> Any:
        return self.channel.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.channel.ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter([*self.channel.ask("list", self)])

    def __bool__(self) -> bool:
        return self.channel.ask("truth", self) is True


class Function(Theirs):
    """A function or class of the program, known by its name."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.channel.ask("call", self, args, options)


def _reference(value: Any) -> list[Any]:
    if not isinstance(value, Theirs):
        raise TypeError(f"a program cannot be given a {type(value).__name__}")
    return ["object", value.reference]


def encode(value: Any, other: Callable[[Any], list[Any]]) -> Any:
    """``value`` as JSON. Numbers, texts and collections are sent as what they are in Python and numpy, whatever a class
    of the program makes of them; ``other`` sends all else.
    """
    numpy = sys.modules.get("numpy")
    match value:
        case None | bool() | str() | float():
            return value
        case int():
            return int(value) if abs(value) < 1 << 63 else ["int", hex(value)]
        case dict():
            return ["dict", [[encode(key, other), encode(one, other)] for key, one in value.items()]]
        case list() | tuple() | frozenset() | Set():
            kind = next((kind for kind in (list, tuple, frozenset) if isinstance(value, kind)), set)
            return [kind.__name__, [encode(one, other) for one in value]]
        case complex():
            return ["complex", value.real, value.imag]
        case bytes() | bytearray():
            return ["bytes", value.hex()]
        case type(__name__=name) if vars(builtins).get(name) is value:
            return ["type", name]
    if numpy and isinstance(value, (numpy.generic, numpy.ndarray)) and value.dtype.kind in NUMPY_KINDS:
        shape = list(value.shape) if isinstance(value, numpy.ndarray) else None
        return ["numpy", value.dtype.str, shape, value.tobytes().hex()]
    if isinstance(value, numbers.Rational):  # also of sympy
        return ["Fraction", hex(int(value.numerator)), hex(int(value.denominator))]
    if isinstance(value, numbers.Real):
        return float(value)
    return ["Decimal", str(value)] if type(value).__name__ == "Decimal" else other(value)


def decode(message: Any, found: Callable[[Any], Any]) -> Any:
    """What ``encode`` sent; ``found`` gives its other objects."""
    if message is None or isinstance(message, bool | int | float | str):
        return message
    match message:
        case ["int", str(text)]:
            return int(text, 16)
        case ["complex", real, imaginary]:
            return complex(real, imaginary)
        case ["bytes", str(text)]:
            return bytes.fromhex(text)
        case ["dict", list(pairs)]:
            return {decode(key, found): decode(one, found) for key, one in pairs}
        case ["list" | "tuple" | "set" | "frozenset" as kind, list(values)]:
            return getattr(builtins, kind)(decode(one, found) for one in values)
        case ["type", str(name)] if isinstance(vars(builtins).get(name), type):
            return getattr(builtins, name)
        case ["numpy", str(kind), shape, str(text)] if kind[1] in NUMPY_KINDS:
            import numpy

            flat = numpy.frombuffer(bytes.fromhex(text), numpy.dtype(kind))
            return flat[0] if shape is None else flat.reshape(shape)
        case ["Fraction", str(above), str(below)]:
            from fractions import Fraction

            return Fraction(int(above, 16), int(below, 16))
        case ["Decimal", str(text)]:
            from decimal import Decimal

            return Decimal(text)
        case ["object", reference]:
            return found(reference)
    raise TypeError("not a value that a program may send")
