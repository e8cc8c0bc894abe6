"""Build the missing shards of a prepared folder, in this process or in several.

A shard is a pure function of the job and its number, so any process can build it at any time, also twice. A worker
exits when its parent is killed; the parent reports a lost worker.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.bridge import TEXTS_AT_ONCE
from megatron_tide.data.encode import Dropped, Encoder
from megatron_tide.data.progress import Progress
from megatron_tide.data.shard import MOST_TOKENS, Sample, read_shard, shard_name, write_shard
from megatron_tide.data.sources import Mixture
from megatron_tide.files import fingerprint, remove_drafts
from megatron_tide.tables import Message
from megatron_tide.workers import workers

TOO_LONG = "more characters than max_chars"
UNREADABLE = "cannot be read"


@dataclass(frozen=True, kw_only=True)
class PrepareJob:
    """Everything that determines the shards: conversations, encoder, rows per shard; and the folder. ``settings``
    (JSON) describes the first three."""

    mixture: Mixture
    encoder: Encoder
    shard_rows: int
    out: Path
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        most = MOST_TOKENS // max(side.length for side in (self.encoder.student, self.encoder.teacher) if side)
        if self.shard_rows > most:
            raise ValueError(f"--shard-rows {self.shard_rows}: a shard of samples of this length holds at most {most}")

    @property
    def shards(self) -> int:
        """How many shards the job has."""
        return -(-len(self.mixture) // self.shard_rows)

    def rows(self, number: int) -> range:
        """The positions of the mixture that go into shard ``number``."""
        return range(number * self.shard_rows, min(len(self.mixture), (number + 1) * self.shard_rows))

    def path(self, number: int) -> Path:
        """The file of shard ``number``."""
        return self.out / shard_name(number)


def finished(job: PrepareJob, number: int) -> bool:
    """Whether shard ``number`` is there, complete, and made by this job (reads the file)."""
    try:
        shard = read_shard(job.path(number))
    except ValueError:
        return False
    origin = {name: shard.record.get(name) for name in ("settings", "number")}
    return origin == {"settings": fingerprint(job.settings), "number": number} and shard.intact()


def build_shard(job: PrepareJob, number: int) -> None:
    """Encode the rows of a shard and write it."""
    samples: list[Sample] = []
    totals, dropped, unreadable, example = Counter[str](), Counter[str](), list[int](), None
    rows = job.rows(number)
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        conversations = []
        for position in rows[start : start + TEXTS_AT_ONCE]:
            found = _conversation(job, position)
            if isinstance(found, str):
                dropped[found] += 1
                unreadable += [position] if found == UNREADABLE else []
            else:
                conversations.append((int(job.mixture.key[position]), found))
        for row in job.encoder.encode_rows(conversations):
            if isinstance(row, Dropped):
                dropped[row.reason] += 1
                example = example or row.error
                continue
            samples.append(row.sample)
            totals["truncated"] += row.truncated
            totals["covered_bytes"] += row.covered_bytes
            totals["total_bytes"] += row.total_bytes
            totals.update(f"{side}_changed" for side in row.changed)
    totals["read"] = len(rows)
    record = {"settings": fingerprint(job.settings), "number": number, "totals": totals, "dropped": dropped}
    write_shard(job.path(number), samples, record | {"example": example, "unreadable": unreadable}, job.mixture.ordered)


def _conversation(job: PrepareJob, position: int) -> list[Message] | str:
    """The messages at a position of the mixture, or why they are dropped before encoding."""
    try:
        spec, messages = job.mixture.conversation(position)
    except ValueError:  # one bad row does not stop a mixture of millions; prepare reports it
        return UNREADABLE
    return TOO_LONG if spec.is_too_long(messages) else messages


def build_missing(job: PrepareJob, missing: Sequence[int], count: int) -> None:
    """Build the shards ``missing`` with ``count`` processes and show progress.

    After any error, finished shards stay; OSError (full disk, killed worker) gives their number.
    """
    for number in missing:  # corrupt shards, or those of another job: from now on every existing shard is finished
        job.path(number).unlink(missing_ok=True)
    done = len(job.mixture) - sum(len(job.rows(number)) for number in missing)
    progress = Progress(len(job.mixture), "preparing rows", done)
    try:
        for number in _build(job, missing) if count == 1 else _build_in_parallel(job, missing, count):
            done += len(job.rows(number))
            progress.update(done)
    except (OSError, BrokenProcessPool) as error:
        kept = sum(job.path(number).exists() for number in range(job.shards))
        reason = str(error) if isinstance(error, OSError) else "a worker died (out of memory? take fewer --workers)"
        raise OSError(
            f"{job.out}: {reason}; {kept} of {job.shards} shards are finished and kept: fix it and run this again"
        ) from error
    finally:
        progress.close()
        remove_drafts(job.out)  # of a worker that was killed


def _build(job: PrepareJob, missing: Sequence[int]) -> Iterator[int]:
    """Build shards one after the other; yield their numbers."""
    for number in missing:
        build_shard(job, number)
        yield number


def _build_in_parallel(job: PrepareJob, missing: Sequence[int], count: int) -> Iterator[int]:
    """Build shards in processes; yield their numbers as they are finished."""
    with workers(count, _start_worker, job) as pool:
        for future in as_completed([pool.submit(_work, number) for number in missing]):
            yield future.result()


_job: PrepareJob | None = None  # of a worker process, set once when it starts


def _start_worker(job: PrepareJob) -> None:
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(number: int) -> int:
    assert _job is not None
    build_shard(_job, number)
    return number
