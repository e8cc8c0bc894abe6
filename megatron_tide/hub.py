"""Folders in hub format: downloads from the Hugging Face hub, with one-line errors, and what a config.json states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_tide.files import read_json


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


def stated_block_size(path: str) -> int | None:
    """``block_size`` of the config.json of a folder or hub name; None where there is none (also for a file).

    Raises:
        ValueError: it is not a number of tokens, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        folder = download(path, ["config.json"], f"{path}: no such folder, and not reachable on the hub")
    if not (folder / "config.json").is_file():
        return None
    size = read_json(folder / "config.json").get("block_size")
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"{folder / 'config.json'}: block_size is {str(size)[:20]!r}, not a number of tokens")
    return size
