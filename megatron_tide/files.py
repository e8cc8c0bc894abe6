"""Atomic writes of files and folders (complete or absent), and checksums to verify them later."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

TEMPORARY = ".tide-tmp-"
LARGEST_TEXT = 1 << 30  # bytes of a file that is read as a whole
LARGEST_JSON = 1 << 27  # bytes of a JSON file: its objects take up to 30 times as much memory
_LARGEST = {"config.json": 1 << 24, "index.json": 1 << 25}  # by the end of its name; the latter of 300,000 tensors
_READERS = 8  # files that are hashed at a time
CHOICE = ".huggingface.yaml"  # of a data folder: which of its files are read, beside README.md
STAGES = "stages"  # beside the stamps of a recipe's stages: which of them its last run has


def create_new(path: Path) -> int:
    """A descriptor of a new file, open for writing. An existing ``path`` is removed; a link is not followed."""
    remove(path)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def open_regular(path: Path, follow: bool = True) -> BufferedReader:
    """A file to read, open. OSError for a FIFO (which would wait for a writer), a folder, or what else is not a regular
    file; without ``follow`` also for a link.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb")


def check_regular(folder: Path) -> None:
    """ValueError for a FIFO or a device in ``folder``: libraries would open it, and wait."""
    for path in sorted(folder.iterdir()):
        if path.is_fifo() or path.is_char_device() or path.is_block_device():
            raise ValueError(f"{path}: not a regular file; restore or remove it")


def read_regular(path: Path, most: int) -> bytes:
    """The first ``most`` bytes of a file. OSError for a link, a FIFO or anything else that is not a regular file."""
    with open_regular(path, follow=False) as file:
        return file.read(most)


def open_to_append(path: Path) -> TextIO:
    """A text file to append to, made if missing. OSError for a link, a FIFO, or what else is no regular file."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "a", buffering=1, encoding="utf-8")


@contextlib.contextmanager
def appending(path: Path) -> Iterator[TextIO]:
    """``open_to_append`` for the block; an OSError of a write, such as a full disk, names ``path``."""
    try:
        with open_to_append(path) as file:
            yield file
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) if error.errno and not error.filename else error from None


def read_whole(path: Path, most: int = LARGEST_TEXT) -> bytes:
    """All bytes of a file that is read as a whole. OSError where it is no regular file, or too large for one."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise OSError(f"{path}: more than {most} bytes, which no such file has; restore it")
    return content


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder with its content; does nothing if there is none."""
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError):  # the latter on some systems
        if not path.is_dir():
            raise
        shutil.rmtree(path)


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_replaceable(path: Path) -> bool:
    """Whether a file can take the place of ``path``: nothing or a file is there, and it is none of the system's paths,
    which may stand for a file now, as /dev/stdout.
    """
    folder = Path(os.path.realpath(path.parent))
    return (path.is_file() or not path.exists()) and folder != Path("/dev") and not folder.is_relative_to("/proc")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[tuple[Path, int]]:
    """A new, empty file to fill, by its name or its descriptor, which takes the place of ``path`` at the end of the
    block: on the disk and complete, or not at all. If the block fails it is removed, and an existing ``path`` is
    unchanged; an OSError names ``path``. What is no file, such as /dev/null, is refused: it would be one afterwards.
    """
    if not is_replaceable(path):
        raise OSError(f"{path}: not a regular file, and is not replaced; remove it, or use another name")
    temporary, descriptor = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}"), -1
    try:
        descriptor = create_new(temporary)
        yield temporary, descriptor
        os.fsync(descriptor)
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # The error of a failed write has no file name.
        if isinstance(error, OSError) and error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    flush(path.parent)


def atomic_write(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` never has partial content: temporary file, fsync, rename, fsync of the folder.

    Raises OSError (such as a full disk) after removing the temporary file; an existing ``path`` is unchanged.
    """
    with replacing(path) as (_, descriptor), os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(content)  # not by its name, at which others may put a link meanwhile


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
                # A link leads elsewhere, and opening a FIFO would wait for a writer.
                if not path.is_symlink() and (path.is_file() or path.is_dir()):
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


def refuse_foreign(folder: Path, names: Iterable[str], mark: str, what: str) -> None:
    """ValueError where ``folder`` has a file that would be replaced, but not the file ``mark``, which every folder of
    this kind, also an unfinished one, has: it is someone else's.
    """
    found = next((name for name in names if os.path.lexists(folder / name)), None)
    if found is not None and not (folder / mark).exists():
        raise ValueError(f"{folder}: has a {found} that is not of {what}; use another --out")


def refuse_other(path: Path, key: str, what: str) -> None:
    """ValueError where a JSON file that would be replaced lacks a ``key`` that ours have; a corrupt one may be ours."""
    try:
        found = read_json(path)
    except ValueError:
        return
    if key not in found:
        raise ValueError(f"{path}: not of {what}, so it is not replaced; use another --out")


def refuse_unlike(path: Path, keys: Iterable[str]) -> None:
    """ValueError where a file that would be replaced holds anything but a JSON object with one of ``keys``."""
    if path.is_file() and path.stat().st_size:
        with contextlib.suppress(ValueError):
            if not read_json(path).keys().isdisjoint(keys):
                return
        raise ValueError(f"{path}: exists, and this command has not written it; remove it, or use another file")


def write_once(path: Path, content: bytes) -> None:
    """``atomic_write``; ValueError where ``path`` exists with other content."""
    if path.exists() and read_whole(path) != content:
        raise ValueError(f"{path}: exists with other content; remove it, or use another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, content)


def remove_drafts(folder: Path, start: str = "") -> None:
    """Remove what killed processes left in ``folder``: temporary files, and drafts of folders ``start...``."""
    for path in folder.glob(f"{TEMPORARY}{start}*"):
        remove(path)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes in hex, read as a stream."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_files(paths: Iterable[Path]) -> list[str]:
    """``sha256_file`` of each, several at a time."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(sha256_file, paths))


def canonical(value: Any) -> bytes:
    """The canonical JSON form of ``value``, for fingerprints."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def fingerprint(value: Any) -> str:
    """The sha256 in hex of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON, atomically and with sorted keys (equal values give equal bytes)."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode("utf-8", "backslashreplace"))  # half a surrogate pair has no other form


def read_json(path: Path, hint: str = "", form: Any = None) -> dict[str, Any]:
    """Read a JSON object; ValueError, one line ending in ``hint``, when it is missing, not JSON, or not an object.

    ``form``: the form that it must have, as :func:`check_form` takes it.
    """
    tail = f"; {hint}" if hint else ""
    try:
        most = next((size for end, size in _LARGEST.items() if path.name.endswith(end)), LARGEST_JSON)
        value = json.loads(read_whole(path, most).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file{tail}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}){tail}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error}){tail}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: contains a JSON {type(value).__name__}, not an object{tail}")
    if form is not None:
        check_form(value, form, f"{path}:", tail)
    return value


def check_form(value: Any, form: Any, where: str, tail: str = "") -> None:
    """ValueError, one line that names the place, where a JSON value does not have a form.

    A form is a type (``float``: any finite number), None, a range of whole numbers, a tuple of forms (any of them),
    ``[form]`` (a list), or an object's keys, of which ``"key?"`` may be missing; ``str`` as a key stands for all others
    (which are allowed also without it).
    """
    if isinstance(form, tuple):
        for one in form:
            if _fits(value, one):
                form = one
        form = form[-1] if isinstance(form, tuple) else form
    if not _fits(value, form):
        shown = str(value) if isinstance(value, bool | int | float | None) else type(value).__name__
        raise ValueError(f"{where.removesuffix(':')}: {shown[:40]}, where {_named(form)} is expected{tail}")
    if isinstance(form, list):
        for number, item in enumerate(value):
            check_form(item, form[0], f"{where}[{number}]", tail)
    elif isinstance(form, dict):
        forms = {key.removesuffix("?"): inner for key, inner in form.items() if key is not str}
        missing = [key for key in form if key is not str and key[-1] != "?" and key not in value]
        if missing:
            raise ValueError(f"{where.removesuffix(':')}: no {missing[0]}{tail}")
        for key, item in value.items():
            check_form(item, forms.get(key, form.get(str, Any)), f"{where} {key[:80]}", tail)


def _fits(value: Any, form: Any) -> bool:
    """Whether a value is of a form's outermost kind."""
    if form is None or form is Any:
        return value is None or form is Any
    if isinstance(form, range):
        return type(value) is int and value in form
    if form is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is (form if isinstance(form, type) else type(form))


def _named(form: Any) -> str:
    if isinstance(form, range):
        return f"a whole number from {form.start} to {form.stop - 1}"
    names = {float: "a number", str: "text", bool: "true or false", int: "a whole number", list: "a list"}
    return "a list" if isinstance(form, list) else names.get(form if isinstance(form, type) else dict, "an object")
