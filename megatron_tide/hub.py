"""Downloads from the Hugging Face hub, with one-line errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def hub_errors(what: str, *more: type[Exception]) -> Iterator[None]:
    """Errors of the hub, the network and the disk (and those of type ``more``) become ValueError: ``what (reason)``."""
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError

    expected: tuple[type[Exception], ...] = (HTTPError, OSError, ValueError, *more)
    try:
        yield
    except LocalTokenNotFoundError:
        raise ValueError(f"{what} (not logged in: run `hf auth login`, or set HF_TOKEN)") from None
    except expected as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{what} ({reason})") from None


def download(name: str, patterns: Sequence[str], what: str) -> Path:
    """The folder of a hub name's files that match ``patterns``, downloaded or from the hub's cache.

    Raises:
        ValueError: ``what (reason)``, one line.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(what):
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
