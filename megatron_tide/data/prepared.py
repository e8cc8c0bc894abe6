"""A prepared folder, opened for training: checked once, then read sample by sample through memory maps.

``manifest.json`` names the shards with their sha256 and holds everything training must agree with: the fingerprints of
tokenizers and bridge, mask / eos / pad ids, block sizes and lengths. Only four numbers per sample stay in memory
(``Stats``); tokens are read through the page cache when a batch needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tide.bounds import MOST_IDS
from megatron_tide.data.shard import (
    ORDER,
    PROMPT,
    SIDES,
    UNALIGNED,
    Array,
    Sample,
    TokenizedSample,
    read_shard,
    shard_name,
)
from megatron_tide.files import check_form, fingerprint, read_json, sha256_file

MANIFEST = "manifest.json"
FORMAT = 2  # 1: shards were safetensors files
_IDS = range(MOST_IDS)
SIDE = {  # of a manifest
    "name": str,
    "fingerprint": str,
    "template_fingerprint?": (None, str),
    "vocab_size": _IDS,
    "mask_id": _IDS,
    "eos_id": _IDS,
    "pad_id": _IDS,
    "length": range(1, 1 << 31),
    "block": range(1, 1 << 31),
}
TEACHER_SIDE = {**SIDE, "mask_id": (None, _IDS)}  # an autoregressive teacher needs no mask
_FORM = {
    "fingerprint": str,
    "content?": str,
    "counts?": {"changed?": {str: range(1 << 53)}},
    "student": TEACHER_SIDE,  # alone, to be scored, it may be autoregressive too
    "teacher": (None, TEACHER_SIDE),
    "bridge": (None, str),
    "own?": [[range(1 << 63)]],
    "ordered?": bool,
    "shards": [{"rows": range(1 << 31), "sha256": str}],
}
_OPEN_SHARDS = 64  # a map holds a file descriptor, and users have as few as 1,024 of them
_AGAIN = "prepare the data again (python -m megatron_tide prepare ...; finished shards are kept)"


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What ordering needs to know of every sample, all [n]: lengths in tokens (teacher 0 in student-only data),
    ``maskable`` student tokens (response and EOS fill), and the sample ``keys`` int64."""

    student_length: NDArray[np.int32]
    teacher_length: NDArray[np.int32]
    maskable: NDArray[np.int32]
    keys: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.keys)


class PreparedData:
    """A prepared folder. ``len(data)`` samples; ``data.sample(i)``; ``data.stats``; ``data.manifest``.

    Use ``PreparedData.open(folder)``; it raises ValueError, in one line that names the file, for anything that is not
    exactly what ``prepare`` wrote.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], rows: Sequence[int], stats: Stats) -> None:
        self.folder = folder
        self.manifest = manifest
        self.stats = stats
        self._starts = np.cumsum([0, *rows])
        self._arrays = functools.lru_cache(_OPEN_SHARDS)(self._read_arrays)

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> PreparedData:
        """Open ``folder``. Headers, lengths and offsets are always checked; ``verify`` also reads every byte: the
        sha256 of each shard, token ids below the vocabulary, chunk ids below the sample's count."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder of prepared data; `python -m megatron_tide prepare` makes one")
        manifest = _read_manifest(folder)
        parts = []
        for number, entry in enumerate(manifest["shards"]):
            path = folder / shard_name(number)
            shard = read_shard(path)
            if verify and sha256_file(path) != entry["sha256"]:
                raise ValueError(f"{path}: its bytes changed since it was written (sha256); {_AGAIN}")
            if len(shard) != entry["rows"]:
                raise ValueError(f"{path}: {len(shard)} samples, but {entry['rows']} in the manifest; {_AGAIN}")
            parts.append(_checked_stats(path, shard.arrays))
            if verify:
                _check_tokens(path, shard.arrays, manifest)
            if (ORDER in shard.arrays) != bool(manifest.get("ordered")):
                raise ValueError(f"{path}: {ORDER} is not as the manifest says; {_AGAIN}")
        if not sum(map(len, parts)):
            raise ValueError(f"{folder}: contains no sample; prepare it from other data or with longer lengths")
        stats = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Stats.__annotations__}
        return cls(folder, manifest, [len(part) for part in parts], Stats(**stats))

    def __len__(self) -> int:
        return len(self.stats)

    @property
    def student_only(self) -> bool:
        """Whether there is no teacher side (data for pretraining)."""
        return self.manifest["teacher"] is None

    @property
    def ordered(self) -> bool:
        """Whether the order is known in which the student wrote responses of its own."""
        return bool(self.manifest.get("ordered"))

    @property
    def fingerprint(self) -> str:
        """A sha256 of what training reads: both sides, and the content of every shard. Folders of earlier versions have
        that of their manifest alone, which also says what files were called.
        """
        return str(self.manifest.get("content", self.manifest["fingerprint"]))

    def sample(self, index: int) -> Sample:
        """Sample ``index`` in 0..len-1; IndexError outside. Its arrays are views of the file: read-only."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        arrays, row = self._arrays(number), index - int(self._starts[number])
        sides = {name: _side(arrays, name, row) for name in SIDES}
        return Sample(
            key=int(arrays["key"][row]),
            student=sides["student"],
            teacher=None if self.student_only else sides["teacher"],
            chunks=int(arrays["chunks"][row]),
            response_bytes=int(arrays["response_bytes"][row]),
        )

    def changed(self, side: str) -> int:
        """The number of rows whose text the tokenizer of ``side`` changed; 0 in folders of earlier versions."""
        return int(self.manifest.get("counts", {}).get("changed", {}).get(side, 0))

    def own(self, keys: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """Whether the student wrote the response of each sample; None where it wrote none of the data's."""
        spans = self.manifest.get("own")
        return None if spans is None else np.any([(keys >= min(s)) & (keys <= max(s)) for s in spans if s], axis=0)

    def check(self, *, student: str, teacher: str | None = None, bridge: str | None = None) -> None:
        """ValueError unless the data were prepared with tokenizers and bridge of these fingerprints (None: none)."""
        expected = {"student": student, "teacher": teacher}
        found = {name: (self.manifest[name] or {}).get("fingerprint") for name in SIDES}
        expected["bridge"], found["bridge"] = bridge, self.manifest["bridge"]
        for name, value in expected.items():
            if found[name] != value:
                what = "bridge" if name == "bridge" else f"{name} tokenizer"
                raise ValueError(
                    f"{self.folder / MANIFEST}: prepared with {what} {_short(found[name])}, this run has "
                    f"{_short(value)}; prepare again into another folder, or use the {what} of the data"
                )

    def check_model(self, side: str, model: str, config: Any) -> None:
        """ValueError where a model of this config has not all tokens of ``side``, or was trained with another mask."""
        of_side = self.manifest[side] or {"vocab_size": 0, "mask_id": None}
        if of_side["vocab_size"] > config.vocab_size:
            raise ValueError(
                f"{model}: config.json has vocab_size {config.vocab_size}, the tokenizer of {self.folder} "
                f"{of_side['vocab_size']} tokens; use the tokenizer made for this model"
            )
        stated, mask = getattr(config, "mask_token_id", None), of_side["mask_id"]
        if stated is not None and mask not in (None, stated):
            raise ValueError(
                f"{model}: config.json has mask_token_id {stated}, {self.folder} was prepared with {mask}; prepare "
                f"again with --{side}-mask {stated}, or restore the model's own"
            )

    def check_template(self, side: str, template: str | None) -> None:
        """ValueError unless the prompts of ``side`` were rendered by the chat template of this fingerprint."""
        found = self.manifest[side].get("template_fingerprint")
        if found != template:
            raise ValueError(
                f"{self.folder / MANIFEST}: prompts rendered with {side} chat template {_short(found)}, the {side}'s "
                f"folder now has {_short(template)}; prepare again into another folder, or restore that template"
            )

    def _read_arrays(self, number: int) -> dict[str, Array]:
        return read_shard(self.folder / shard_name(number)).arrays


def _short(value: str | None) -> str:
    return value[:12] if value else "none"


def _side(arrays: Mapping[str, Array], name: str, row: int) -> TokenizedSample:
    start, end = (int(x) for x in arrays[f"{name}_offsets"][row : row + 2])
    return TokenizedSample(
        ids=arrays[f"{name}_ids"][start:end],
        chunk=arrays[f"{name}_chunk"][start:end],
        prompt=int(arrays[f"{name}_prompt"][row]),
        content_end=int(arrays[f"{name}_content_end"][row]),
        order=arrays[f"{name}_order"][start:end] if f"{name}_order" in arrays else None,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json(path, "the folder is not (or not completely) prepared: run `python -m megatron_tide prepare`")
    if manifest.get("format") == 1:
        raise ValueError(f"{path}: prepared by an older version; run the prepare command again with --fresh")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r}, this version reads {FORMAT}; {_AGAIN}")
    stated = manifest.get("fingerprint")
    if stated != fingerprint({name: value for name, value in manifest.items() if name != "fingerprint"}):
        raise ValueError(f"{path}: does not match its own fingerprint (edited or corrupt); {_AGAIN}")
    check_form(manifest, _FORM, f"{path}:", f"; {_AGAIN}")
    return manifest


def _checked_stats(path: Path, arrays: Mapping[str, Array]) -> Stats:
    lengths = {}
    for side in SIDES:
        offsets = arrays[f"{side}_offsets"]
        length = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(arrays[f"{side}_ids"]) or (length < 0).any():
            raise ValueError(f"{path}: {side}_offsets do not increase from 0 to the number of tokens; {_AGAIN}")
        prompt, end = arrays[f"{side}_prompt"], arrays[f"{side}_content_end"]
        present = length > 0
        if ((prompt < 0) | (end < prompt) | (end >= length))[present].any():
            raise ValueError(f"{path}: a {side} prompt or content end is outside its sample; {_AGAIN}")
        lengths[side] = length.astype(np.int32)
    if ((arrays["chunks"] < 0) | (arrays["chunks"] > lengths["student"])).any():
        raise ValueError(f"{path}: a sample has more chunks than student tokens; {_AGAIN}")
    return Stats(
        student_length=lengths["student"],
        teacher_length=lengths["teacher"],
        maskable=lengths["student"] - np.asarray(arrays["student_prompt"]),
        keys=np.array(arrays["key"], np.int64),
    )


def _check_tokens(path: Path, arrays: Mapping[str, Array], manifest: dict[str, Any]) -> None:
    for side in SIDES:
        ids, chunk = arrays[f"{side}_ids"], arrays[f"{side}_chunk"]
        vocabulary = (manifest[side] or {"vocab_size": 0})["vocab_size"]
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary):
            raise ValueError(f"{path}: {side}_ids outside the vocabulary of {vocabulary}; {_AGAIN}")
        lengths = np.diff(arrays[f"{side}_offsets"])
        if (chunk < UNALIGNED).any() or (chunk >= np.repeat(arrays["chunks"], lengths)).any():
            raise ValueError(f"{path}: {side}_chunk outside the chunks of its sample; {_AGAIN}")
        position = np.arange(len(ids)) - np.repeat(arrays[f"{side}_offsets"][:-1], lengths)
        in_prompt = position < np.repeat(arrays[f"{side}_prompt"], lengths)
        order = arrays.get(f"{side}_order", in_prompt[:0])
        if (order < 0).any() or (order[in_prompt[: len(order)]] != 0).any():
            raise ValueError(f"{path}: {side}_order has tokens of prompts, or numbers below 0; {_AGAIN}")
        if ((chunk == PROMPT) != in_prompt).any():
            raise ValueError(f"{path}: {side}_chunk does not mark the same tokens as prompt as {side}_prompt; {_AGAIN}")
