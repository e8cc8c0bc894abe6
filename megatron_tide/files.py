"""Atomic writes of files and folders (complete or absent), and checksums to verify them later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

TEMPORARY = ".tide-tmp-"


def create_new(path: Path) -> int:
    """A descriptor of a new file, open for writing. An existing ``path`` is removed; a link is not followed."""
    remove(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def read_regular(path: Path, most: int) -> bytes:
    """The first ``most`` bytes of a file. OSError for a link, a FIFO or anything else that is not a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path}: not a regular file")
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder with its content; does nothing if there is none."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # the latter on some systems
        shutil.rmtree(path)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` never has partial content: temporary file, fsync, rename, fsync of the folder.

    Raises OSError (such as a full disk) after removing the temporary file; an existing ``path`` is unchanged.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        with os.fdopen(create_new(temporary), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename is None:  # the error of a failed write has no file name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    flush(path.parent)


class AtomicFolder:
    """A folder that appears complete or not at all: ``with AtomicFolder(final) as draft: ...`` fills ``draft``.

    At the end of the block the draft is flushed to disk and replaces ``final``, the old content of which is then
    removed. If the block fails, or the process dies, ``final`` is unchanged. A killed process leaves its draft next to
    ``final``; the next one removes it. Without ``with``: ``open``, then ``commit`` or ``discard``.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.draft = final.with_name(f"{TEMPORARY}{final.name}")
        self._old = final.with_name(f"{TEMPORARY}{final.name}.old")
        self._mode = 0

    def open(self) -> Path:
        """The empty draft. Until ``commit`` only this user can access it, so no link can be planted in it."""
        if self._old.exists() and not self.final.exists():  # a process died between the two renames of ``commit``
            self._old.rename(self.final)
        self.discard()
        self.draft.parent.mkdir(parents=True, exist_ok=True)
        self.draft.mkdir()
        self._mode = stat.S_IMODE(self.draft.stat().st_mode)
        self.draft.chmod(0o700)
        return self.draft

    def commit(self) -> None:
        """Replace ``final`` by the draft."""
        for folder, _, names in os.walk(self.draft, topdown=False):
            for path in [*(Path(folder, name) for name in names), Path(folder)]:
                if not path.is_symlink():
                    flush(path)
        self.draft.chmod(self._mode)
        if self.final.exists():
            remove(self._old)
            self.final.rename(self._old)
        try:
            self.draft.rename(self.final)
        except OSError:
            if self._old.exists():
                self._old.rename(self.final)
            raise
        flush(self.final.parent)
        remove(self._old)

    def discard(self) -> None:
        """Remove the draft."""
        remove(self.draft)

    def __enter__(self) -> Path:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()


def sweep(folder: Path, start: str = "") -> None:
    """Remove what killed processes left in ``folder``: temporary files, and drafts of folders ``start...``."""
    for path in folder.glob(f"{TEMPORARY}{start}*"):
        remove(path)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes in hex, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: Any) -> bytes:
    """The canonical JSON form of ``value``, for fingerprints."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def fingerprint(value: Any) -> str:
    """The sha256 in hex of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically and with sorted keys (equal values give equal bytes)."""
    atomic_write(path, (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """Read a JSON object; ValueError, one line ending in ``hint``, when it is missing, not JSON, or not an object."""
    tail = f"; {hint}" if hint else ""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file{tail}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}){tail}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: contains a JSON {type(value).__name__}, not an object{tail}")
    return value
