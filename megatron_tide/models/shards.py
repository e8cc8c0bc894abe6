"""Folders of safetensors shards, read and written one shard at a time.

Nothing is unpickled: a folder with only ``.bin`` weights is refused. Files are written under a temporary name and
renamed, the index last, so an interrupted write leaves no folder that looks complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_tide.bounds import LONGEST_NAME
from megatron_tide.files import canonical, create_new, open_regular, read_json, sha256_files, write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
T = TypeVar("T")
WHOLE = 1 << 31  # bytes of a folder's shards that its fingerprint reads to the last one
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
_PIECE = 1024  # bytes of a tensor that its folder's fingerprint reads, at three places
_BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)  # a header
NOT_THE_MODEL = ("transformers_version", "_name_or_path")  # keys of config.json that say who wrote it


class ShardedFolder:
    """The tensors of a folder in hub format: which keys it has, and their data, one shard open at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = self._find()

    @property
    def keys(self) -> set[str]:
        return set(self._file_of)

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(key, tensor on CPU) for each of ``keys``, shard by shard. ValueError names a shard that is broken."""
        return self._each(keys, lambda shard, key: shard.get_tensor(key))

    def headers(self, keys: Iterable[str]) -> Iterator[tuple[str, tuple[list[int], str]]]:
        """(key, (shape, data type)) for each of ``keys``. ValueError names a shard that is broken."""

        def read(shard: Any, key: str) -> tuple[list[int], str]:
            part = shard.get_slice(key)
            return part.get_shape(), part.get_dtype()

        return self._each(keys, read)

    def fingerprint(self, every_byte: bool = False) -> str:
        """sha256 hex of which model this is: configuration, shards' sizes and headers, and the start, middle and end of
        every tensor, so that a folder of 32 GB takes seconds; then, with ``every_byte`` or of up to ``WHOLE``, "-" and
        that of all bytes. Where two shards have a tensor, also which of them the index takes. Compare with
        ``same_model``. ValueError names a broken file.
        """
        config = read_json(self.folder / "config.json")
        digest = hashlib.sha256(canonical({k: v for k, v in config.items() if k not in NOT_THE_MODEL}))
        shards, unread = [self.folder / name for name in sorted(set(self._file_of.values()))], []
        for path in shards:
            with _readable(path, _BROKEN):
                keys = _add_shard(digest, path)
            unread += [[path.name, key] for key in sorted(keys) if self._file_of.get(key, path.name) != path.name]
        if unread:
            digest.update(canonical(unread))
        if not every_byte and sum(path.stat().st_size for path in shards) > WHOLE:
            return digest.hexdigest()
        whole = hashlib.sha256("".join(sha256_files(shards)).encode())
        return f"{digest.hexdigest()}-{whole.hexdigest()}"

    def _each(self, keys: Iterable[str], read: Callable[[Any, str], T]) -> Iterator[tuple[str, T]]:
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._file_of[key], []).append(key)
        for name, names in sorted(by_file.items()):
            path = self._regular(name)
            with _readable(path), safe_open(path, framework="pt") as shard:
                for key in names:
                    yield key, read(shard, key)

    def _find(self) -> dict[str, str]:
        index = self.folder / INDEX
        if index.exists():
            return self._from_index(index)
        if (self.folder / SINGLE).exists():
            single = self._regular(SINGLE)
            with _readable(single), safe_open(single, framework="pt") as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        pickles = sorted(path.name for path in self.folder.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{self.folder}: only pickled weights ({pickles[0]}), not supported; convert them to safetensors"
            )
        raise ValueError(f"{self.folder}: no weights ({SINGLE} or {INDEX})")

    def _regular(self, name: str) -> Path:
        """The path of a shard; ValueError where opening it would wait, as for a FIFO."""
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"{path}: not a regular file; copy or download it again")
        if not os.access(path, os.R_OK):  # the library would say that there is none
            raise ValueError(f"{path}: you may not read it; change its permissions")
        return path

    def _from_index(self, index: Path) -> dict[str, str]:
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not file_of:
            raise ValueError(f"{index}: has no weight_map")
        odd = next(
            (
                key
                for key, name in file_of.items()
                if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or "\0" in name
            ),
            None,
        )
        if odd is not None:
            raise ValueError(f"{index}: {str(file_of[odd])[:40]!r} for {odd[:80]!r} is no file name; restore the file")
        for name in sorted(set(file_of.values())):
            if Path(name).name != name:
                raise ValueError(f"{index}: names {name!r}, which is not a file in the same folder")
            if not (self.folder / name).exists():
                raise ValueError(f"{self.folder / name}: missing, but listed in {INDEX}; download it again")
        return file_of


def same_model(one: object, other: object) -> bool:
    """Whether two fingerprints are of one model. Those of large folders and of earlier versions have one part only."""
    if isinstance(one, str) and isinstance(other, str):
        return all(mine == theirs for mine, theirs in zip(one.split("-"), other.split("-")))
    return one == other


@contextlib.contextmanager
def _readable(path: Path, errors: tuple[type[Exception], ...] = (SafetensorError, OSError)) -> Iterator[None]:
    """The ``errors`` of reading a shard become ValueError, one line."""
    try:
        yield
    except errors as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy or download it again") from None


def _add_shard(digest: Any, path: Path) -> set[str]:
    """Add a shard to a fingerprint; the names of its tensors."""
    with open_regular(path) as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"its header of {length} bytes does not fit into {size}")
        header = file.read(length)
        digest.update(f"{path.name} {size} ".encode() + header)
        entries = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
        for start, end in sorted(entry["data_offsets"] for entry in entries.values()):
            for place in (start, (start + end) // 2, max(start, end - _PIECE)):
                digest.update(os.pread(file.fileno(), min(_PIECE, end - place), 8 + length + place))
    return set(entries)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Write (key, tensor) pairs as shards of at most ``max_shard_bytes``; -> bytes of tensors.

    Pairs are read one at a time and only one shard is in memory; a larger tensor gets its own shard. Shards are first
    written under temporary names, because their number is known only at the end.
    """
    parts: list[Path] = []
    key_part: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    held = total = 0

    def flush() -> None:
        nonlocal shard, held
        path = folder / f".shard-{len(parts):05d}.part"
        _save(shard, path)
        parts.append(path)
        shard, held = {}, 0

    for key, tensor in tensors:
        if shard and held + tensor.nbytes > max_shard_bytes:
            flush()
        # A copy: an expert's slice shares storage with the full stack, which safetensors refuses.
        shard[key] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        key_part[key] = len(parts)
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    names = (
        [SINGLE]
        if len(parts) == 1
        else [f"model-{k + 1:05d}-of-{len(parts):05d}.safetensors" for k in range(len(parts))]
    )
    for part, name in zip(parts, names):
        part.replace(folder / name)
    if len(parts) > 1:
        weight_map = {key: names[part] for key, part in key_part.items()}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A new safetensors file that others may read as they may any new file; the library makes it the owner's alone."""
    descriptor = create_new(path)  # a link in its place would be followed
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def _save(shard: dict[str, Tensor], path: Path) -> None:
    try:
        save_tensors(shard, path)
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    except (SafetensorError, OSError) as error:
        path.unlink(missing_ok=True)
        raise ValueError(f"{path.parent}: cannot write weights ({error})") from None
