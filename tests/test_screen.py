"""What an error says, whatever it is."""

from __future__ import annotations

import dataclasses
import io
import sys

import pytest

from megatron_tide import errors
from megatron_tide.ranks import again, stated
from megatron_tide.screen import LONGEST_WORDS, clean_output, words_of


class Wordless(ValueError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class NoText(ValueError):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Frozen(ValueError):
    number: int


class Told(RuntimeError):
    told = "by somebody"


class Panic(BaseException):
    """As a library in Rust has them."""


ERRORS = [
    (Wordless(), 2, "error: Wordless\n", "Wordless"),
    (NoText(), 2, "error: NoText\n", "NoText"),
    (Frozen(3), 2, "error: 3\n", "3"),
    (ValueError(), 2, "error: ValueError\n", "ValueError"),
    (OSError(), 2, "error: OSError\n", "OSError"),
    (Told("here"), 1, "Told: here\n", "Told: here"),
    (Panic("at the disk"), 1, "Panic: at the disk\n", "Panic: at the disk"),
    (MemoryError(), 2, "error: out of memory (MemoryError)\n", "MemoryError"),
    (Exception("no space (os error 28)"), 2, "error: no space (os error 28)\n", "Exception: no space (os error 28)"),
    (
        RuntimeError("Symlink loop from '/x'"),
        2,
        "error: Symlink loop from '/x'\n",
        "RuntimeError: Symlink loop from '/x'",
    ),
    (RuntimeError("can't allocate memory"), 2, "(can't allocate memory)\n", "RuntimeError: can't allocate memory"),
    (SystemExit("no disk"), 1, "no disk\n", "SystemExit: no disk"),
    (SystemExit(256), 1, "", "SystemExit: 256"),
    (SystemExit(2**40 + 7), 7, "", f"SystemExit: {2**40 + 7}"),
    (SystemExit(), 0, "", "SystemExit"),
    (KeyboardInterrupt(), 130, "interrupted\n", "KeyboardInterrupt"),
]


@pytest.mark.parametrize(("error", "status", "end", "text"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_is_told_once_and_stated_to_other_ranks(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, end: str, text: str
) -> None:
    assert (errors.tell(error), errors.tell(error)) == (status, status)
    printed = capsys.readouterr().err
    assert printed.endswith(end)
    assert printed.count(end.strip() or "none") == bool(end)
    assert stated(error)[1] == text
    assert str(again(stated(error))) == text


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_of_ten_megabytes_the_start_is_told(capsys: pytest.CaptureFixture[str], kind: type[Exception]) -> None:
    error = kind("x" * 10**7)
    errors.tell(error)
    printed = capsys.readouterr().err
    assert printed.startswith("error: xxx" if kind is ValueError else "RuntimeError: xxx")
    assert "... (10,000,0" in printed
    assert len(printed) < LONGEST_WORDS + 100 > len(stated(error)[1])
    assert words_of(ValueError(f"a.json: {'x' * 5000} is no number; mend it")).endswith("x... is no number; mend it")


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_where_nothing_can_be_printed_the_status_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        assert errors.tell(ValueError("no space left")) == errors.EXIT_USER_ERROR
    monkeypatch.undo()


def test_what_a_terminal_has_no_letters_for_is_shown_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clean_output()
    print("\u4e16 \xe9", flush=True)
    assert shown.getvalue() == b"\\u4e16 \\xe9\n"
