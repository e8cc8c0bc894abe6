"""Data sets of others that the ``datasets`` library reads: their own files alone, as rows of text, of bounded size.

The library follows what a data set says of itself (other files, pictures to open) and unpacks what it is given.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_tide.files import CHOICE, fingerprint, open_regular, read_json, read_whole, sha256_file
from megatron_tide.tables.arrow import check_stream, kept_by, read_saved
from megatron_tide.tables.formats import Csv, RowFile, json_format
from megatron_tide.tables.unpack import check_size, unpacked

_SPLITS, _FILES_OF = "dataset_dict.json", "state.json"  # of a data set that was saved to a folder
_FORMATS = ("arrow", "csv", "json", "parquet", "text")  # of the library's, those of rows of text
_ROWS_IN = (".arrow", ".jsonl", ".parquet")
_CARD = 1 << 20  # characters of a description, of which the library reads a megabyte in some seconds
_MEMORY = 4 << 30  # bytes to read a data set in, beside a multiple of its own
_CHOSEN = ("name", "version", "data_dir", "data_files", "description", "sep", "delimiter")
"""Fields of a configuration beside those that only the library knows how to read by."""


def open_folder(folder: Path, name: str | None, split: str) -> tuple[Any | list[RowFile] | list[Path], str]:
    """The rows of a folder as ``datasets`` has them, and a digest of its files.

    The split's files in place of the rows, where they are JSON or CSV (one bad row would end the library's reading, and
    it would guess types), also compressed, or Parquet files of other columns each (which the library does not join).

    Raises:
        ValueError: it names files outside it, is corrupt or has no such split; the library's errors are any.
    """
    _check_own(folder)
    place, before = folder, _states(folder)
    content = _digest(folder, name, split)
    if os.path.lexists(folder / _SPLITS):
        splits = read_json(folder / _SPLITS, "restore the file", {"splits": [str]})["splits"]
        if split not in splits:
            raise ValueError(f"{folder / _SPLITS}: no split {split!r}; it has {', '.join(splits)[:200]}")
        folder /= split
    if os.path.lexists(folder / _FILES_OF):
        named = read_json(folder / _FILES_OF, "restore the file", {"_data_files": [{"filename": str}]})["_data_files"]
        if not named:
            raise ValueError(f"{folder / _FILES_OF}: names no file of rows")
        return read_saved([folder / one["filename"] for one in named]), content
    for path in folder.rglob("*.arrow"):
        check_stream(path)

    def read(kept: str) -> Any:
        builder = _builder(str(folder), kept, name=name, inside=_places(folder))
        _check_formats(folder, builder)
        files = _files(builder, split)
        rows = _row_files(builder, [(file, str(file)) for file in files], Path(kept) / "unpacked")
        if rows is None:
            return files if _differ(builder.name, files) else _rows(builder, split)
        return rows

    rows = _with_kept(content, read)
    _check_unchanged(place, before, content)
    return rows, content


def open_parquet(path: Path) -> tuple[Any, str]:
    """``open_folder`` for one Parquet file."""
    with open_regular(path) as file:
        if file.read(4) != b"PAR1":
            raise ValueError("not a Parquet file")
    before, content = _states(path), sha256_file(path)
    inside = [path.resolve()]
    rows = _with_kept(
        content, lambda kept: _rows(_builder("parquet", kept, data_files=str(path), inside=inside), "train")
    )
    _check_unchanged(path, before, content)
    return rows, content


def _with_kept(content: str, read: Callable[[str], Any]) -> Any:
    """What ``read`` makes of files of this content, and keeps in a folder; once more where what is there is broken."""
    kept = kept_by(content)
    if Path(kept).exists():
        with contextlib.suppress(Exception):  # of any library
            return read(kept)
        shutil.rmtree(kept, ignore_errors=True)
    return read(kept)


def _states(place: Path) -> list[tuple[Path, int, int]]:
    """Size and time of a file, or of those of a folder."""
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    states = ((path, path.stat()) for path in found if path.is_file())
    return [(path, state.st_size, state.st_mtime_ns) for path, state in states]


def _check_unchanged(place: Path, before: list[tuple[Path, int, int]], content: str) -> None:
    """ValueError where files changed after their digest was taken; what was made of them is not kept by it."""
    if _states(place) != before:
        shutil.rmtree(kept_by(content), ignore_errors=True)
        raise ValueError(f"{place}: changed while it was read; start again")


def open_hub(path: str, name: str | None, split: str, revision: str | None) -> Any | list[RowFile]:
    """``open_folder`` for a data set of the hub, without a digest."""
    import datasets

    builder = datasets.load_dataset_builder(path, name, revision=revision)
    _check_format(builder)
    _check_names(path, builder.config.data_files)
    named = _named(builder, split)
    if _is_text(builder) and named and not any("::" in one for one in named):
        files = list(map(Path, datasets.DownloadManager().download(named)))
        names = [f"{path}/{one.partition('@')[2].partition('/')[2]}" for one in named]
        kept = Path(kept_by(fingerprint(list(map(sha256_file, files))))) / "unpacked"
        rows = _row_files(builder, list(zip(files, names, strict=True)), kept)
        if rows is not None:
            return rows
    with bounded(0):
        builder.download_and_prepare()
    return _as_stored(builder.as_dataset(split=split))


def _is_text(builder: Any) -> bool:
    """Whether a data set is JSON or CSV as everyone writes it: its own description says nothing else."""
    config = builder.config
    sep = str(getattr(config, "sep", ","))
    if builder.name not in ("csv", "json") or len(sep) != 1 or not sep.isascii() or sep in '"\r\n':
        return False
    return all(getattr(config, one.name) == one.default for one in fields(config) if one.name not in _CHOSEN)


def _row_files(builder: Any, files: Sequence[tuple[Path, str]], kept: Path) -> list[RowFile] | None:
    """Files, and their names in messages, to be read row by row; None where only the library knows how."""
    found = []
    for number, (file, name) in enumerate(files if _is_text(builder) else ()):
        for plain, inner in unpacked(file, name, kept / str(number)):
            csv = builder.name == "csv"
            format = Csv.of(plain, inner, builder.config.sep) if csv else json_format(plain, inner)
            if format is None:
                return None
            found.append(RowFile(plain, inner, format))
    return found or None


def _builder(path: str, kept: str, *, inside: list[Path], **how: Any) -> Any:
    import datasets

    builder = datasets.load_dataset_builder(path, cache_dir=kept, **how)
    _check_format(builder)
    for file in _files(builder):
        if not any(file.resolve().is_relative_to(place) for place in inside) or not file.is_file():
            raise ValueError(f"its README names {str(file)[:80]!r}, which is not in it")
    return builder


def _named(builder: Any, split: str | None = None) -> list[str]:
    """The paths, or addresses on the hub, of a split's files, or of all."""
    named = (builder.config.data_files or {}).items()
    return [str(file) for key, found in named if split is None or key == split for file in found]


def _files(builder: Any, split: str | None = None) -> list[Path]:
    return list(map(Path, _named(builder, split)))


def _rows(builder: Any, split: str) -> Any:
    files = _files(builder)
    with bounded(sum(file.stat().st_size for file in files)):
        for file in [] if Path(builder.cache_dir).exists() else files:  # else it was read to its end before
            check_size(file)
        builder.download_and_prepare()
    return _as_stored(builder.as_dataset(split=split))


def _differ(format: str, files: list[Path]) -> bool:
    """Whether files are Parquet of several kinds of rows."""
    from pyarrow import parquet

    if format != "parquet" or len(files) < 2:
        return False
    with bounded(sum(file.stat().st_size for file in files)):
        first, *others = (parquet.read_schema(file).remove_metadata() for file in files)
    return any(not one.equals(first) for one in others)


def _check_formats(folder: Path, builder: Any) -> None:
    """ValueError for rows in another format, which the library would pass over without a word."""
    if "default" not in builder.config.name or any((folder / one).exists() for one in ("README.md", CHOICE)):
        return  # they may say what is read
    read = {file.suffix for file in _files(builder)}
    for path in sorted(folder.rglob("*")):
        if path.suffix in _ROWS_IN and path.suffix not in read and not path.name.startswith("."):
            raise ValueError(f"it has rows in {', '.join(sorted(read))} and in {path.name}: keep files of one format")


def _check_format(builder: Any) -> None:
    if builder.name not in _FORMATS:
        raise ValueError(f"its files are read as {builder.name}, not as rows of text: use JSON Lines or Parquet")


def _as_stored(table: Any) -> Any:
    """The table, of which no picture or sound is decoded: its rows name files of this machine, or addresses."""

    def walk(feature: Any) -> None:
        if getattr(feature, "decode", False) and type(feature).__name__ != "Json":
            feature.decode = False
        inner = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else ()
        for one in (*inner, *([feature.feature] if hasattr(feature, "feature") else ())):
            walk(one)

    features = table.features  # a copy
    walk(features)
    table.info.features = features
    return table


@contextlib.contextmanager
def bounded(given: int) -> Iterator[None]:
    """MemoryError beyond what files of ``given`` bytes need: 4 GiB, and 8 times their size, more than now."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError, ValueError):  # no such file: not Linux
        now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        most = [now + _MEMORY + 8 * given, *(limit for limit in before if limit != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_DATA, (min(most), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _check_names(name: str, files: dict[str, list[str]] | None) -> None:
    """ValueError where a hub data set's own description names files of this machine, or of other data sets."""
    for path in (path for paths in (files or {}).values() for path in paths):
        if not str(path).rpartition("::")[2].startswith(f"hf://datasets/{name}@"):
            raise ValueError(f"its README names {str(path)[:80]!r}, which is not in it")


def _named_in(value: Any) -> Iterator[str]:
    """Every text in a value that names files."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _named_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named_in(item)


def _check_own(folder: Path) -> None:
    """ValueError where a folder's links or its own descriptions, which ``datasets`` follows, name files outside it."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    class Plain(yaml.SafeLoader):
        """Without aliases, by which a few lines stand for billions of values, or for one that holds itself."""

        def compose_node(self, *place: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(*place)

    named: list[tuple[Path, str]] = []
    for path in (folder / "README.md", folder / CHOICE):
        text = read_whole(path).decode("utf-8", "replace") if path.exists() else ""
        if text.startswith("\ufeff"):  # the library would overlook the front matter behind it
            raise ValueError(f"{path}: begins with a byte-order mark; save it without one")
        if path.suffix == ".md":  # as the library finds it
            found = REGEX_YAML_BLOCK.search(text)
            text = found[2] if found else ""
        if len(text) > _CARD:
            raise ValueError(f"{path}: its front matter has more than {_CARD} characters; fix or remove it")
        try:
            about = yaml.load(text, Plain)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise ValueError(f"{path}: its front matter is not YAML without aliases; fix or remove it") from None
        configs = about.get("configs", []) if isinstance(about, dict) else about
        named += [(path, name) for name in _named_in(configs)]
    for path in (*folder.rglob(_FILES_OF), *folder.rglob(_SPLITS)):
        about = read_json(path)
        named += [(path, name) for name in _named_in([about.get("_data_files"), about.get("splits")])]
    for path, name in named:
        if Path(name).is_absolute() or ":" in name or any(part.startswith(".") for part in Path(name).parts):
            raise ValueError(f"{path}: names {name[:80]!r}, which is hidden or not in its folder; remove that")
    own = _places(folder)
    for path in folder.rglob("*"):
        try:
            inside = not path.is_symlink() or any(path.resolve().is_relative_to(place) for place in own)
        except (OSError, RuntimeError):  # a link to itself
            inside = False
        if not inside:
            raise ValueError(f"{path}: a link to a file outside its folder; replace it by a copy of that file")


def _places(folder: Path) -> list[Path]:
    """Where the files of a folder may be: in it, and for one of the hub's cache, where its links lead."""
    real = folder.resolve()
    return [real, *([real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [])]


def _digest(folder: Path, name: str | None, split: str) -> str:
    own = (path for path in folder.rglob("*") if not path.name.startswith(".") or path == folder / CHOICE)
    files = sorted(path for path in own if path.is_file())
    return fingerprint([name, split, [(path.relative_to(folder).as_posix(), sha256_file(path)) for path in files]])
