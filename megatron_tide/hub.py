"""Folders in hub format: downloads with one-line errors, what a config.json states, and names without local paths."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tide.bounds import CONFIG, shown
from megatron_tide.files import read_json

_NAME = r"[A-Za-z0-9][\w.-]{0,95}"
HUB_NAME = re.compile(f"{_NAME}/{_NAME}", flags=re.A)
_LOCAL_KEYS = {"out", "resume", "teacher_nvme", "refused_example", "unreadable", "shards"}
_HUB_KEYS = {"student", "teacher", "model_folder", "name", "path", "data", "validation"}  # may hold names of the hub
_SECRET = re.compile(
    r"\b(hf_|gh[pousr]_|glpat-|sk-)[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|[A-Z_]*(KEY|TOKEN|SECRET|PASSWORD)[A-Z_]*=\S+"
)
_HOME = re.compile(r"^~[^/\\]*$|^/root$|([/\\]Users|/home)[/\\][^/\\]+$")
_FILES = (".json", ".jsonl", ".parquet", ".arrow", ".csv", ".txt", ".model", ".tiktoken", ".gguf")


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


def may_be_hub_name(path: str, owner: bool = True) -> bool:
    """Whether ``path``, where nothing is, can be a name on the hub: owner/name; without ``owner`` also a name alone.

    A file's name is none, and "runs/teacher" is none where there is a folder "runs".
    """
    if path.endswith(_FILES):
        return False
    if "/" in path:
        return HUB_NAME.fullmatch(path) is not None and not Path(path).parent.exists()
    return not owner and re.fullmatch(_NAME, path, flags=re.A) is not None


def check_hub_name(path: str, owner: bool = True) -> None:
    """ValueError, one line, unless ``path``, where no folder is, can be a model's name on the hub."""
    if not may_be_hub_name(path, owner):
        raise ValueError(f"{path}: no such folder" + ("" if "/" in path else ", and no hub name (organisation/model)"))


def download(name: str, patterns: Sequence[str], what: str, cached: bool = False) -> Path:
    """The folder of a hub name's files that match ``patterns``, downloaded or from the hub's cache; ``cached``: from
    there alone.

    Raises:
        ValueError: ``what (reason)``, one line.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(what):
        only: dict[str, Any] = {"local_files_only": True} if cached else {}
        return Path(snapshot_download(name, allow_patterns=list(patterns), **only))


def stated_config(path: str) -> dict[str, Any]:
    """The config.json of a folder or hub name, which nothing has checked; {} where there is none (also for a file).

    Raises:
        ValueError: it cannot be read, or the hub cannot be reached.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        check_hub_name(path, owner=False)
        folder = download(path, ["config.json"], f"{path}: no such folder, and not reachable on the hub")
    return read_json(folder / "config.json") if (folder / "config.json").exists() else {}


def stated_block_size(path: str) -> int | None:
    """``block_size`` of ``stated_config``; None where there is none.

    Raises:
        ValueError: it is not a number of tokens, or the hub cannot be reached.
    """
    size = stated_config(path).get("block_size")
    if size is not None and (type(size) is not int or not 1 <= size <= CONFIG["block_size"]):
        raise ValueError(f"{path}/config.json: block_size is {shown(size)}, not a number of tokens")
    return size


def one_line(text: str) -> str:
    """``text`` with a single space for each run of spaces, line ends and other characters that do not print, and
    without tokens and passwords.
    """
    return " ".join(_SECRET.sub("(secret)", "".join(c if c.isprintable() else " " for c in text)).split())


def public_name(value: str, may_be_on_hub: bool = True) -> str:
    """The last part of a local path or an address; a hub name, or text that is not a path, unchanged. One line, without
    the name of a user or a machine.
    """
    value = one_line(value)
    if may_be_on_hub and may_be_hub_name(value) and not Path(value).exists():
        return value
    if "://" in value:
        value = re.sub("//[^/]*@", "//", re.split("[?#]", value)[0])
    value = re.sub("%2f|%5c", "/", value, flags=re.I).rstrip("/\\")
    if _HOME.search(value) or value == str(Path.home()):
        return "~"
    return re.sub(r"^[\w.-]+@[\w.-]+:(?!\s)", "", re.split(r"[/\\]", value)[-1])


def published(value: Any, local: Collection[str] = (), key: str = "") -> Any:
    """A recorded setting, or all of them, as strangers may read it: names in place of paths, nothing that is of this
    machine alone. ``local``: paths that look like names of the hub.
    """
    if isinstance(value, Mapping):
        items = {str(name): item for name, item in value.items() if name not in _LOCAL_KEYS}
        return {public_name(name, False): published(item, local, name) for name, item in items.items()}
    if isinstance(value, list | tuple):
        return [published(item, local, key) for item in value]
    return public_name(value, key in _HUB_KEYS and value not in local) if isinstance(value, str) else value
