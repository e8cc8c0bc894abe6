"""Commands as functions of their arguments, in this process."""

from __future__ import annotations

from collections.abc import Callable

from megatron_tide.__main__ import main


def command(name: str) -> Callable[[list[str]], int]:
    """``python -m megatron_tide NAME``; mistakes are exceptions, unless it is called by ``cli.run``."""
    return lambda argv: main([name, *argv])
