"""What one rank does for all of them: its value, or its error, reaches every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from megatron_tide.screen import words_of


class World(Protocol):
    @property
    def is_main(self) -> bool: ...

    def broadcast_object(self, value: Any) -> Any: ...


def on_main(world: World, work: Callable[[], Any]) -> Any:
    """``work()`` of rank 0, on every rank (a collective): all ranks return its value, or raise its error."""
    answer: Any = None
    own: BaseException | None = None
    if world.is_main:
        try:
            answer = (work(), None)
        except KeyboardInterrupt:  # of a user who does not want to wait
            raise
        except BaseException as error:  # a panic of a library in Rust is no Exception
            answer, own = (None, stated(error)), error
    value, failure = world.broadcast_object(answer)
    if own is not None:
        raise own
    if failure is not None:
        raise again(failure)
    return value


def stated(error: BaseException) -> tuple[str, str]:
    """An error as two texts, which any other rank can read: kind, message."""
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind.__name__, words_of(error)
    name, text = type(error).__name__, words_of(error)
    return "RuntimeError", name if text == name else f"{name}: {text}"


def again(failure: tuple[str, str]) -> Exception:
    """The error that another rank stated."""
    kind, text = failure
    return {"ValueError": ValueError, "OSError": OSError}.get(kind, RuntimeError)(text)
