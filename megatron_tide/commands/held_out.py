"""Held-out text as it is -> prepared data for the models of an evaluation, with the defaults of bridge and prepare."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from megatron_tide.commands import BLOCK, bridge, prepare, sample

if TYPE_CHECKING:
    from megatron_tide.data import PreparedData


@contextmanager
def held_out(data: Path, models: Sequence[tuple[str, str | None]]) -> Iterator[PreparedData]:
    """``data`` if it is a prepared folder; else prepared, in a folder that is removed afterwards, for ``models``: path
    and role of each (student, teacher, or None: student if it has the tokenizer of the first that is no teacher).

    Raises:
        ValueError: the models have more than two tokenizers, or one side has several tokenizers or block sizes; or
            what bridge and prepare raise.
    """
    from megatron_tide.data import PreparedData

    if data.is_dir() and not _is_text(data):
        yield PreparedData.open(data)
        return
    with TemporaryDirectory(prefix="megatron_tide-") as folder:
        with redirect_stdout(sys.stderr):  # the table alone is the output of an evaluation
            prepared = _prepared(data, Path(folder), models)
        yield PreparedData.open(prepared)


def _is_text(folder: Path) -> bool:
    """Whether a folder holds data files, and is not a prepared one."""
    ours = any((folder / name).exists() for name in ("manifest.json", "settings.json"))
    return not ours and any(path.suffix in (".jsonl", ".parquet") for path in folder.iterdir())


@dataclass(frozen=True)
class _Side:
    path: str
    folder: Path
    tokenizer: str
    block: int | None
    mask: str | None
    """Stated by the model's config where its tokenizer defines none."""

    @classmethod
    def of(cls, path: str) -> _Side:
        from megatron_tide.bridge import load_tokenizer
        from megatron_tide.hub import stated_block_size, stated_config
        from megatron_tide.training_checkpoint import folder_and_block

        folder, block = folder_and_block(path)
        tokenizer, mask = load_tokenizer(folder), stated_config(str(folder)).get("mask_token_id")
        own = tokenizer.describe()["mask_id"] is not None or mask is None
        block = block or stated_block_size(str(folder))
        return cls(path, folder, tokenizer.fingerprint, block, None if own else str(mask))


def _prepared(data: Path, folder: Path, models: Sequence[tuple[str, str | None]]) -> Path:
    every = [(role, _Side.of(path)) for path, role in models]
    first = next((side for role, side in every if role != "teacher"), every[0][1])
    students = [side for role, side in every if role == "student" or (not role and side.tokenizer == first.tokenizer)]
    teachers = [side for role, side in every if role == "teacher" or (not role and side.tokenizer != first.tokenizer)]
    student = _one(data, students or teachers)
    teacher = _one(data, teachers) if teachers else None
    flags: dict[str, Any] = {"student": str(student.folder), "student_mask": student.mask}
    if teacher:
        flags |= {"teacher": str(teacher.folder), "teacher_mask": teacher.mask}
        sample.run(sample.Args(data=(str(data),), out=folder / "sample.jsonl"))
        bridge.run(bridge.Args(**flags, sample=(folder / "sample.jsonl",), out=folder / "bridge"))
        flags |= {"bridge": folder / "bridge", "teacher_block": teacher.block}
    asked = prepare.Args(**flags, student_block=student.block, data=(str(data),), out=folder / "data")
    prepare.run(asked, to_score=True)
    return folder / "data"


def _one(data: Path, sides: Sequence[_Side]) -> _Side:
    """What all of ``sides`` share."""
    first = sides[0]
    for other in sides[1:]:
        if other.tokenizer != first.tokenizer:
            raise ValueError(
                f"--data {data}: {first.path} and {other.path} have different tokenizers; score at most two tokenizers "
                "at a time, students of one and teachers of the other"
            )
        if other.block != first.block:
            raise ValueError(
                f"--data {data}: {first.path} has blocks of {first.block or BLOCK} tokens and {other.path} of "
                f"{other.block or BLOCK}; prepare the data for one size first (prepare --student-block)"
            )
    return first
