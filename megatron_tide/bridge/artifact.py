"""The bridge between two tokenizers: vocabulary map, text -> chunks, and its folder on disk.

A folder with ``manifest.json`` (fingerprints of both tokenizers, special ids, shared prefix, coverage on a sample) and
``vocab_map.safetensors`` (``student_ids``, ``teacher_ids`` int64 [K]: pairs of ids with the same bytes; ``prefix_ids``
int64 [V_t], see ``map_prefixes``, which folders of earlier versions lack). Both are covered by checksums; the manifest
is written last: a folder that has one is complete.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_tide.bounds import MOST_IDS
from megatron_tide.bridge.align import TEXTS_AT_ONCE, Spelling, align_batch, align_spans
from megatron_tide.bridge.tokenizer import Encoding, TextTokenizer
from megatron_tide.bridge.vocabulary import map_prefixes, map_vocabularies, shared_prefix, spelling
from megatron_tide.files import atomic_write, read_json, read_whole, write_json
from megatron_tide.files import fingerprint as fingerprint_of

FORMAT = "megatron_tide.bridge/1"
MANIFEST = "manifest.json"
VOCAB_MAP = "vocab_map.safetensors"
_SIDES = ("student", "teacher")
_IDENTITY = ("fingerprint", "vocab_size", "mask_id", "eos_id", "pad_id")
_AFFECTS_ALIGNMENT = ("format", *_SIDES, "shared", "shared_prefix", "vocab_map_sha256")
_IDS = range(MOST_IDS + 1)
_SIDE = {"name": str, "fingerprint": str, "vocab_size": _IDS}
_SIDE |= dict.fromkeys(("mask_id", "eos_id", "pad_id"), (None, range(MOST_IDS)))
_SAMPLE = dict.fromkeys(("texts", "bytes", "student_tokens", "teacher_tokens", "chunks", "one_to_one"), range(1 << 60))
_SPELLING = dict.fromkeys(("vocabulary", "sample"), dict.fromkeys(("one_token", "several_tokens", "none"), float))
_FORM = {
    "sha256": str,
    "manifest": {
        "format": str,
        "student": _SIDE,
        "teacher": _SIDE,
        "shared": bool,
        "shared_prefix": _IDS,
        "mapped": _IDS,
        "vocab_map_sha256": str,
        "sample": {**_SAMPLE, "coverage": float, "spelling?": _SPELLING},
        "request": dict,
        "fingerprint": str,
    },
}


@dataclass(frozen=True)
class EncodedPair:
    """One text's tokens on both sides, not aligned yet."""

    text: str
    student: Encoding
    teacher: Encoding

    @classmethod
    def of(cls, student: TextTokenizer, teacher: TextTokenizer, text: str) -> EncodedPair:
        """Tokenize ``text``, ordinary text without special tokens; ValueError where a tokenizer refuses it."""
        return cls(text, student.encode_with_bytes(text), teacher.encode_with_bytes(text))


@dataclass(frozen=True)
class Aligned:
    """One text on both sides. Chunk ids per token: 0 .. n_chunks - 1, or UNALIGNED (-2) for a token in no chunk.

    ``total_bytes``: bytes of the text; ``covered_bytes``: bytes that lie in chunks.
    """

    student_ids: np.ndarray
    teacher_ids: np.ndarray
    student_chunk: np.ndarray
    teacher_chunk: np.ndarray
    n_chunks: int
    covered_bytes: int
    total_bytes: int

    def one_to_one(self) -> int:
        """Number of chunks of exactly one token on both sides."""
        counts = [_tokens_per_chunk(chunk, self.n_chunks) for chunk in (self.student_chunk, self.teacher_chunk)]
        return int(((counts[0] == 1) & (counts[1] == 1)).sum())


class Bridge:
    """A pair of tokenizers and what they share. Create it with ``build`` or ``load``; after ``load``, call
    ``check`` before aligning.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        student_ids: np.ndarray,
        teacher_ids: np.ndarray,
        tokenizers: tuple[TextTokenizer, TextTokenizer] | None = None,
        prefix_ids: np.ndarray | None = None,
    ) -> None:
        self.manifest = manifest
        self.prefix_ids = prefix_ids
        self.student_ids = student_ids
        self.teacher_ids = teacher_ids
        self._tokenizers = tokenizers

    @classmethod
    def build(
        cls,
        student: TextTokenizer,
        teacher: TextTokenizer,
        texts: Iterable[str],
        *,
        request: Mapping[str, Any] | None = None,
    ) -> Bridge:
        """Compare the vocabularies id by id, and measure coverage on ``texts``, samples of the distillation data.

        ``request`` is stored in the manifest; a later run compares it to see whether it can reuse this bridge.
        ValueError for a sample without text.
        """
        prefix, identical = shared_prefix(student, teacher)
        sample, same_ids, used = _measure(student, teacher, texts, same=identical)
        if not sample["bytes"]:
            raise ValueError("the bridge's sample has no text to measure coverage on; use data with assistant turns")
        shared = identical and same_ids
        pairs = map_vocabularies(student, teacher, prefix if shared else None)
        manifest: dict[str, Any] = {"format": FORMAT}
        manifest.update({side: tok.describe() for side, tok in zip(_SIDES, (student, teacher))})
        manifest.update(shared=shared, shared_prefix=prefix, mapped=len(pairs[0]))
        prefixes = map_prefixes(student, teacher, prefix if shared else None)
        sample["spelling"] = _shares(spelling(student, teacher, prefixes), used)
        manifest.update(vocab_map_sha256=_map_fingerprint(*pairs), sample=sample, request=dict(request or {}))
        manifest.update(prefix_map_sha256=_map_fingerprint(prefixes))
        manifest["fingerprint"] = _fingerprint(manifest)
        return cls(manifest, *pairs, tokenizers=(student, teacher), prefix_ids=prefixes)

    @classmethod
    def load(cls, folder: str | Path) -> Bridge:
        """Read a bridge folder and verify its checksums; ValueError for a missing, corrupt or modified one."""
        folder = Path(folder)
        hint = "build the bridge again with --fresh"
        missing = [name for name in (MANIFEST, VOCAB_MAP) if not (folder / name).exists()]
        if missing:
            raise ValueError(f"{folder}: no bridge here ({missing[0]} is missing); {hint}")
        record = read_json(folder / MANIFEST, hint, _FORM)
        manifest = record["manifest"]
        try:
            pairs = load(read_whole(folder / VOCAB_MAP))
            student_ids, teacher_ids = (pairs[f"{side}_ids"] for side in _SIDES)
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{folder / VOCAB_MAP}: cannot be read ({error}); {hint}") from error
        prefix_ids, sizes = pairs.get("prefix_ids"), [manifest[side]["vocab_size"] for side in _SIDES]
        if manifest["shared_prefix"] > min(sizes):
            raise ValueError(
                f"{folder}: shared_prefix {manifest['shared_prefix']} of vocabularies of {sizes} ids cannot be; {hint}"
            )
        intact = manifest["format"] == FORMAT and record["sha256"] == fingerprint_of(manifest)
        intact = intact and manifest["fingerprint"] == _fingerprint(manifest)
        intact = intact and manifest["vocab_map_sha256"] == _map_fingerprint(student_ids, teacher_ids)
        prefixes = None if prefix_ids is None else _map_fingerprint(prefix_ids)
        intact = intact and manifest.get("prefix_map_sha256") == prefixes
        intact = intact and (prefix_ids is None or _is_prefix_map(prefix_ids, manifest))
        shapes = {(ids.dtype.name, ids.ndim, len(ids) if ids.ndim else 0) for ids in (student_ids, teacher_ids)}
        intact = intact and shapes == {("int64", 1, manifest["mapped"])}
        if not intact or not all(_inside(ids, size) for ids, size in zip((student_ids, teacher_ids), sizes)):
            raise ValueError(f"{folder}: the bridge's checksums do not match its content; {hint}")
        return cls(manifest, student_ids, teacher_ids, prefix_ids=prefix_ids)

    def save(self, folder: str | Path) -> None:
        """Write the folder, the manifest last; each file is written atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"manifest": self.manifest, "sha256": fingerprint_of(self.manifest)}
        maps = {"student_ids": self.student_ids, "teacher_ids": self.teacher_ids}
        maps |= {} if self.prefix_ids is None else {"prefix_ids": self.prefix_ids}
        atomic_write(folder / VOCAB_MAP, save(maps))
        write_json(folder / MANIFEST, record)

    def check_vocabularies(self, student: TextTokenizer, teacher: TextTokenizer) -> None:
        """Refuse (ValueError) tokenizers of other vocabularies than those it was built for."""
        for side, tokenizer in zip(_SIDES, (student, teacher)):
            self._compare(side, tokenizer, {"fingerprint": tokenizer.fingerprint})

    def check(self, student: TextTokenizer, teacher: TextTokenizer) -> Bridge:
        """Attach the two tokenizers; ValueError for other tokenizers than those of the bridge, or other special ids."""
        self.check_vocabularies(student, teacher)
        for side, tokenizer in zip(_SIDES, (student, teacher)):
            described = tokenizer.describe()
            self._compare(side, tokenizer, {key: described[key] for key in _IDENTITY})
        self._tokenizers = (student, teacher)
        return self

    def _compare(self, side: str, tokenizer: TextTokenizer, values: Mapping[str, Any]) -> None:
        built = self.manifest[side]
        for key, value in values.items():
            if value != built[key]:
                raise ValueError(
                    f"{tokenizer.name}: not the {side} tokenizer that the bridge was built for ({built['name']}): "
                    f"{key} is {value}, the bridge has {built[key]}; build the bridge for these tokenizers"
                )

    @property
    def fingerprint(self) -> str:
        """sha256 hex of everything that affects an alignment; the sample and the tokenizers' names do not."""
        return self.manifest["fingerprint"]

    @property
    def shared(self) -> bool:
        """Same tokenizer: equal id by id over both vocabularies (added tokens may differ), same ids for the sample,
        same eos.
        """
        return self.manifest["shared"]

    @property
    def shared_prefix(self) -> int:
        """Number of leading ids that mean the same on both sides, compared one by one."""
        return self.manifest["shared_prefix"]

    @property
    def coverage(self) -> float:
        """Share of the sample's bytes that lie in chunks."""
        return self.manifest["sample"]["coverage"]

    def require_coverage(self, floor: float) -> None:
        """ValueError if less than ``floor`` (a share, 0 to 1) of the sample's bytes lies in chunks."""
        if self.coverage < floor:
            raise ValueError(
                f"the bridge covers {self.coverage:.4f} of the sample's bytes, less than {floor}: the tokenizers "
                "change the text in different ways (see the inspect command); choose others or lower --coverage-floor"
            )

    def encode_with_bytes(self, text: str, ids: np.ndarray | None = None) -> EncodedPair:
        """Tokenize ``text`` on both sides: ordinary text, no special tokens. ValueError where a side refuses it.

        ``ids`` (int32 [n]): the student's tokens of the text, taken as they are where they spell it, and the teacher's
        spell the same (``student.ids`` are then ``ids``). With a shared tokenizer they are the teacher's too.
        """
        student, teacher = self._checked()
        known = None if ids is None else student.spelled(ids, text)
        if known is not None:
            others = known if self.shared else teacher.encode_with_bytes(text)
            if others.data == known.data:
                return EncodedPair(text, known, others)
        return EncodedPair.of(student, teacher, text)

    def align(self, encodings: Sequence[EncodedPair]) -> list[Aligned]:
        """Align texts, in order; fastest with TEXTS_AT_ONCE texts per call.

        If the bytes of the two sides differ (one normalises, or has no token for a character), chunks cover all text
        but the tokens with such a letter. A shared tokenizer's tokens are one chunk each.
        """
        return align_encodings(*self._checked(), encodings, same=self.shared)

    def align_texts(self, texts: Iterable[str]) -> list[Aligned]:
        """``encode_with_bytes`` and ``align``."""
        return self.align([self.encode_with_bytes(text) for text in texts])

    def align_text(self, text: str) -> Aligned:
        """``align_texts`` of one text."""
        return self.align_texts([text])[0]

    def _checked(self) -> tuple[TextTokenizer, TextTokenizer]:
        if self._tokenizers is None:
            raise ValueError("the bridge was loaded without tokenizers; call check(student, teacher) first")
        return self._tokenizers


def align_text(student: TextTokenizer, teacher: TextTokenizer, text: str, *, same: bool = False) -> Aligned:
    """``align_texts`` of one text."""
    return align_texts(student, teacher, [text], same=same)[0]


def align_texts(
    student: TextTokenizer, teacher: TextTokenizer, texts: Iterable[str], *, same: bool = False
) -> list[Aligned]:
    """``Bridge.align_texts`` for two tokenizers without a bridge. ``same``: an id means the same on both sides."""
    return align_encodings(student, teacher, [EncodedPair.of(student, teacher, text) for text in texts], same=same)


def align_encodings(
    student: TextTokenizer, teacher: TextTokenizer, encodings: Sequence[EncodedPair], *, same: bool = False
) -> list[Aligned]:
    """``Bridge.align`` for two tokenizers without a bridge. ``same``: an id means the same on both sides."""
    aligned: dict[int, Aligned] = {}
    agreeing: list[int] = []
    for place, both in enumerate(encodings):
        left, right = both.student, both.teacher
        if same and np.array_equal(left.ids, right.ids):
            # Token by token, so that one without bytes of its own (a lone dummy prefix) is a chunk too.
            chunk, size = np.arange(len(left.ids), dtype=np.int32), len(left.data)
            aligned[place] = Aligned(left.ids, right.ids, chunk, chunk.copy(), len(chunk), size, size)
            continue
        raw = both.text.encode("utf-8")
        # If both sides drop the same character, they agree with each other but not with the text.
        skipping = not left.data == right.data == raw and _has_byteless_tokens(left, right, student, teacher)
        if left.data == right.data and not skipping:
            agreeing.append(place)
        else:
            aligned[place] = _align_places(both, student, teacher)
    student_lens = [encodings[place].student.lengths for place in agreeing]
    teacher_lens = [encodings[place].teacher.lengths for place in agreeing]
    for place, chunks in zip(agreeing, align_batch(student_lens, teacher_lens)):
        left, right = encodings[place].student, encodings[place].teacher
        aligned[place] = Aligned(left.ids, right.ids, *chunks, len(left.data), len(left.data))
    return [aligned[place] for place in range(len(encodings))]


def _align_places(both: EncodedPair, student: TextTokenizer, teacher: TextTokenizer) -> Aligned:
    """Chunks of all stretches of the text that both sides spell alike."""
    sides = [
        Spelling(side.lengths, side.data, tokenizer.spans(both.text), tokenizer.has_no_bytes(side.ids))
        for side, tokenizer in ((both.student, student), (both.teacher, teacher))
    ]
    total = len(both.text.encode("utf-8"))
    return Aligned(both.student.ids, both.teacher.ids, *align_spans(sides[0], sides[1], total), total)


def _has_byteless_tokens(left: Encoding, right: Encoding, student: TextTokenizer, teacher: TextTokenizer) -> bool:
    return bool(student.has_no_bytes(left.ids).any() or teacher.has_no_bytes(right.ids).any())


def _measure(
    student: TextTokenizer, teacher: TextTokenizer, texts: Iterable[str], same: bool
) -> tuple[dict[str, Any], bool, np.ndarray]:
    """Totals over ``texts``, whether both sides have the same ids, and how often each teacher id occurs, [V_t]."""
    used = np.zeros(teacher.vocab_size, np.int64)
    totals = dict.fromkeys(
        ("texts", "bytes", "covered_bytes", "student_tokens", "teacher_tokens", "chunks", "one_to_one"), 0
    )
    same_ids = True
    for aligned in _aligned(student, teacher, texts, same):
        same_ids = same_ids and np.array_equal(aligned.student_ids, aligned.teacher_ids)
        totals["texts"] += 1
        totals["bytes"] += aligned.total_bytes
        totals["covered_bytes"] += aligned.covered_bytes
        totals["student_tokens"] += len(aligned.student_ids)
        totals["teacher_tokens"] += len(aligned.teacher_ids)
        totals["chunks"] += aligned.n_chunks
        totals["one_to_one"] += aligned.one_to_one()
        used += np.bincount(aligned.teacher_ids, minlength=len(used))
    return {**totals, "coverage": totals["covered_bytes"] / max(totals["bytes"], 1)}, same_ids, used


def _shares(kinds: np.ndarray, used: np.ndarray) -> dict[str, dict[str, float]]:
    """The shares of the teacher's tokens that are one student token, several, or unknown to the student: of those in
    the sample, and of the vocabulary.
    """
    names = {2: "one_token", 1: "several_tokens", 0: "none"}
    weights = {"sample": used, "vocabulary": np.ones_like(used)}
    return {
        where: {name: float(weight[kinds == kind].sum() / max(weight.sum(), 1)) for kind, name in names.items()}
        for where, weight in weights.items()
    }


def _aligned(student: TextTokenizer, teacher: TextTokenizer, texts: Iterable[str], same: bool) -> Iterator[Aligned]:
    remaining = iter(texts)
    while group := list(islice(remaining, TEXTS_AT_ONCE)):
        yield from align_texts(student, teacher, group, same=same)


def _tokens_per_chunk(chunk: np.ndarray, chunks: int) -> np.ndarray:
    return np.bincount(chunk[chunk >= 0], minlength=chunks)


def _inside(ids: np.ndarray, size: int) -> bool:
    return not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < size)


def _fingerprint(manifest: Mapping[str, Any]) -> str:
    relevant = {key: manifest[key] for key in _AFFECTS_ALIGNMENT}
    for side in _SIDES:
        relevant[side] = {key: manifest[side][key] for key in _IDENTITY}
    return fingerprint_of(relevant)


def _is_prefix_map(prefix_ids: np.ndarray, manifest: Mapping[str, Any]) -> bool:
    """Whether there is one student id, or -1, for each of the teacher's."""
    student, teacher = (manifest[side]["vocab_size"] for side in _SIDES)
    fits = prefix_ids.dtype == np.int64 and prefix_ids.shape == (teacher,)
    return bool(fits and (prefix_ids >= -1).all() and (prefix_ids < student).all())


def _map_fingerprint(*maps: np.ndarray) -> str:
    return hashlib.sha256(b"".join(ids.astype("<i8").tobytes() for ids in maps)).hexdigest()
