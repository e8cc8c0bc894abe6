"""Building the missing shards of a prepared folder, in this process or in several.

A shard is a pure function of the job and its number, so it does not matter who builds it, when, or how often. A worker
that loses its parent ends; a parent that loses a worker says so.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.bridge import TEXTS_AT_ONCE
from megatron_tide.data.chat import Message
from megatron_tide.data.encode import Dropped, Encoded, Encoder
from megatron_tide.data.progress import Progress
from megatron_tide.data.shard import Sample, read_header, shard_name, write_shard
from megatron_tide.data.sources import Mixture
from megatron_tide.files import fingerprint

TOO_LONG = "more characters than max_chars"
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class PrepareJob:
    """All that decides the shards: conversations, how to encode them, rows a shard; and the folder. ``settings``
    (JSON) describes the first three."""

    mixture: Mixture
    encoder: Encoder
    shard_rows: int
    out: Path
    settings: dict[str, Any]

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
    """Whether shard ``number`` is there, whole, and made by this job (reads the file)."""
    try:
        shard = read_header(job.path(number))
    except ValueError:
        return False
    return shard.record["settings"] == fingerprint(job.settings) and shard.record["number"] == number and shard.intact()


def build_shard(job: PrepareJob, number: int, counter: Any = None) -> None:
    """Encode the rows of a shard and write it. ``counter`` (a shared integer) goes up by the rows read."""
    samples: list[Sample] = []
    record: dict[str, Any] = {"settings": fingerprint(job.settings), "number": number, "example": None}
    totals: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    rows = job.rows(number)
    for start in range(0, len(rows), TEXTS_AT_ONCE):
        group = rows[start : start + TEXTS_AT_ONCE]
        for row in _encode(job, group):
            if isinstance(row, Dropped):
                dropped[row.reason] += 1
                record["example"] = record["example"] or row.error
                continue
            samples.append(row.sample)
            totals["truncated"] += row.truncated
            totals["covered_bytes"] += row.covered_bytes
            totals["total_bytes"] += row.total_bytes
        totals["read"] += len(group)
        if counter is not None:
            with counter.get_lock():
                counter.value += len(group)
    write_shard(job.path(number), samples, record | {"totals": totals, "dropped": dropped})


def _encode(job: PrepareJob, positions: range) -> list[Encoded | Dropped]:
    """What comes of the rows at ``positions`` of the mixture; those that are too long first, the others in order."""
    long: list[Encoded | Dropped] = []
    rows: list[tuple[int, list[Message]]] = []
    for position in positions:
        spec, messages = job.mixture.conversation(position)
        if spec.max_chars is not None and sum(len(message["content"]) for message in messages) > spec.max_chars:
            long.append(Dropped(TOO_LONG))
        else:
            rows.append((int(job.mixture.key[position]), messages))
    return long + job.encoder.encode_rows(rows)


def build_missing(job: PrepareJob, missing: Sequence[int], workers: int) -> None:
    """Build the shards ``missing`` with ``workers`` processes, saying how far it is.

    Whatever stops it, finished shards stay; OSError (a full disk, a killed worker) says how many there are.
    """
    progress = Progress(len(job.mixture), "preparing rows")
    done = len(job.mixture) - sum(len(job.rows(number)) for number in missing)
    progress.update(done)
    built = 0
    try:
        for rows, complete in _in_turn(job, missing) if workers == 1 else _in_parallel(job, missing, workers):
            progress.update(done + rows)
            built += complete
    except (OSError, BrokenProcessPool) as error:
        kept = job.shards - len(missing) + built
        reason = str(error) if isinstance(error, OSError) else "a worker died (out of memory? take fewer --workers)"
        raise OSError(
            f"{job.out}: {reason}; {kept} of {job.shards} shards are finished and kept: fix it and run this again"
        ) from error
    finally:
        progress.close()


def _in_turn(job: PrepareJob, missing: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(rows read so far, shards finished since the last time), again and again."""
    rows = 0
    for number in missing:
        build_shard(job, number)
        rows += len(job.rows(number))
        yield rows, 1


def _in_parallel(job: PrepareJob, missing: Sequence[int], workers: int) -> Iterator[tuple[int, int]]:
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    with _pool(workers, context, (job, counter)) as pool:
        waiting: set[Future[None]] = {pool.submit(_work, number) for number in missing}
        while waiting:
            finished_now, waiting = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
            # All results are taken before any error is raised, so that what is finished is counted.
            failures = [error for future in finished_now if (error := future.exception())]
            yield counter.value, len(finished_now) - len(failures)
            if failures:
                raise failures[0]


@contextmanager
def _pool(workers: int, context: Any, job: tuple[PrepareJob, Any]) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, context, _start_worker, job)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_job: tuple[PrepareJob, Any] | None = None  # of a worker process, set once when it starts


def _start_worker(job: PrepareJob, counter: Any) -> None:
    global _job
    _job = job, counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interruption means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(number: int) -> None:
    assert _job is not None
    job, counter = _job
    build_shard(job, number, counter)
