"""Prepare data: tokenise conversations for student and teacher, align them, and store them.

After an interruption, run the same command again: finished shards are kept, and the result is byte for byte the same.
Without --teacher and --bridge the data are for training a student without a teacher. Rows that cannot be read, or whose
messages have more than 1,048,576 characters, are left out and counted; more than 1 % of such rows end the command. A
folder may hold JSON Lines, JSON lists, CSV (whose values are all text) or Parquet; the text files also compressed, to
be unpacked to at most 64 times their size plus 1 GiB.

Examples:
  python -m megatron_tide prepare --data recipes/mixtures/paper.json --student DIR --teacher DIR --bridge DIR --out DIR
  python -m megatron_tide prepare --data runs/quickstart/corpus/train.jsonl --student runs/quickstart/student --out DIR
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.cli import flag, say
from megatron_tide.commands import BLOCK, COVERAGE_FLOOR, STUDENT_LENGTH, TEACHER_LENGTH, mask_flag, refuse_unused

_LOOKED_AT = 100  # rows, for text that a tokenizer changes
# On a cluster a job may use fewer cores than the machine has.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Args:
    data: tuple[str, ...] = flag(..., "Data: mixture .json, .jsonl, .parquet, folder or hub name", metavar="DATA")
    student: str = flag(..., "Tokenizer of the student: folder, hub name or file", metavar="TOKENIZER")
    teacher: str | None = flag(None, "Tokenizer of the teacher; needs --bridge", metavar="TOKENIZER")
    bridge: Path | None = flag(
        None, "Folder made by the bridge command; needs --teacher", metavar="DIR", reads="folder"
    )
    out: Path = flag(..., "Folder to write", metavar="DIR")
    student_length: int = flag(
        STUDENT_LENGTH,
        "Maximum length of the student's sequence, in tokens; longer responses are cut at a chunk boundary",
        low=1,
        high=1 << 24,
    )
    teacher_length: int = flag(
        TEACHER_LENGTH, "Maximum length of the teacher's sequence, in tokens", low=1, high=1 << 24
    )
    student_block: int | None = flag(
        None,
        "Block size that the student is trained with; responses are padded with EOS to a multiple of it",
        shown=f"that of --student's config.json, else {BLOCK}",
        low=1,
        high=1 << 24,
    )
    teacher_block: int | None = flag(
        None,
        "Block size of the teacher, in the same way",
        shown=f"that of --teacher's config.json, else {BLOCK}",
        low=1,
        high=1 << 24,
    )
    student_mask: str | None = mask_flag("student")
    teacher_mask: str | None = mask_flag("teacher")
    trust_remote_code: bool = flag(False, "Run Python code that comes with a tokenizer")
    workers: int = flag(_CORES, "Number of processes", low=1)
    shard_rows: int = flag(1024, "Number of rows per shard; an interruption costs each worker at most one shard", low=1)
    limit: int | None = flag(None, "Number of rows to read, evenly spaced over the mixture", shown="all", low=1)
    coverage_floor: float = flag(
        COVERAGE_FLOOR, "Minimum share of the response bytes that chunks must cover", low=0, metavar="SHARE"
    )
    fresh: bool = flag(False, "Start over, even if --out was prepared with other settings")


def run(args: Args, *, to_score: bool = False) -> None:
    """``to_score``: no student is trained on it, so an autoregressive model may stand in a student's place."""
    if (args.teacher is None) != (args.bridge is None):
        raise ValueError("--teacher and --bridge need each other; set both, or neither to train without a teacher")
    if args.teacher is None:
        alone = ("teacher_length", "teacher_block", "teacher_mask", "coverage_floor")
        refuse_unused(args, "data for student and teacher: add --teacher and --bridge", alone)
    import sys

    from megatron_tide.data.build import PrepareJob
    from megatron_tide.data.prepare import prepare, settings_of, summary
    from megatron_tide.data.sources import open_mixture

    encoder, mixture = _encoder(args, to_score), open_mixture(args.data)
    for name, model, length in (
        ("student", args.student, args.student_length),
        ("teacher", args.teacher, args.teacher_length),
    ):
        _warn_of_positions(name, model, length)
    if encoder.bridge is None:  # which would say how much of the text is the same
        _tell_changes(encoder.student.tokenizer, mixture)
    job = PrepareJob(
        mixture=mixture.limited(args.limit),
        encoder=encoder,
        shard_rows=args.shard_rows,
        out=args.out,
        settings=settings_of(mixture, encoder, args.shard_rows, args.limit),
    )
    manifest = prepare(job, workers=args.workers, coverage_floor=args.coverage_floor, fresh=args.fresh)
    say(summary(job, manifest), file=sys.stderr)


def _encoder(args: Args, to_score: bool) -> Any:
    from megatron_tide.bridge import Bridge, load_tokenizer
    from megatron_tide.data.encode import Encoder, TokenizerSettings
    from megatron_tide.hub import stated_block_size

    trust = args.trust_remote_code
    student = load_tokenizer(args.student, mask_token=args.student_mask, trust_remote_code=trust)
    block = args.student_block or stated_block_size(args.student) or BLOCK
    needs_mask = not to_score or _needs_mask(student, args.student)
    side = TokenizerSettings(tokenizer=student, length=args.student_length, block=block, needs_mask=needs_mask)
    if args.teacher is None or args.bridge is None:
        return Encoder(student=side)
    teacher = load_tokenizer(args.teacher, mask_token=args.teacher_mask, trust_remote_code=trust)
    block = args.teacher_block or stated_block_size(args.teacher) or BLOCK
    needs_mask = _needs_mask(teacher, args.teacher)
    other = TokenizerSettings(tokenizer=teacher, length=args.teacher_length, block=block, needs_mask=needs_mask)
    bridge = Bridge.load(args.bridge)
    bridge.check(student, teacher)
    return Encoder(student=side, teacher=other, bridge=bridge)


def _tell_changes(tokenizer: Any, mixture: Any) -> None:
    """Tell of responses, among the first rows, that the tokenizer changes: those are what the model learns to write."""
    import sys

    from megatron_tide.bridge.changes import first_change
    from megatron_tide.tables import ASSISTANT

    found: list[str] = []
    for position in range(min(_LOOKED_AT, len(mixture))):
        with contextlib.suppress(ValueError):  # rows that are left out
            _, messages = mixture.conversation(position)
            found.append(first_change(tokenizer, (one["content"] for one in messages if one["role"] == ASSISTANT)))
    changed = [*filter(None, found)]
    if changed:
        many = f"{len(changed)} of the first {len(found)} rows"
        say(
            f"note: the tokenizer changes the text of {many}, as the model will write it: {changed[0]}", file=sys.stderr
        )


def _warn_of_positions(name: str, model: str | None, length: int) -> None:
    """Tell of a length that the model's config says it was not made for."""
    import sys

    from megatron_tide.hub import stated_config

    most = stated_config(model).get("max_position_embeddings") if model else None
    if type(most) is int and length > most:
        say(
            f"warning: --{name}-length {length}: {model} was made for {most} tokens (max_position_embeddings); longer "
            "samples are beyond what it knows",
            file=sys.stderr,
        )


def _needs_mask(tokenizer: Any, path: str) -> bool:
    """False for an autoregressive model (a folder or hub name) whose tokenizer has no mask token."""
    from megatron_tide.hub import stated_config
    from megatron_tide.models.families import FAMILIES

    family = FAMILIES.get(str(stated_config(path).get("model_type")))
    return tokenizer.describe()["mask_id"] is not None or family is None or not family.shifts_by_one
