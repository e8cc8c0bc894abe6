"""Run a hosted teacher on all inputs that runs will have, and write its outputs (``hosting.cached``).

    steps of each seed -> micro-batches (as in training) -> backend.score -> outputs -> rank 0 -> one shard of them

Any hosting and number of ranks. A killed one keeps its finished shards; ``manifest.json`` comes last.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tide.clock import Clock
from megatron_tide.config import DistillConfig
from megatron_tide.data import DistributedBatchSampler
from megatron_tide.diffusion import DistillBatch
from megatron_tide.files import fingerprint, read_json, refuse_foreign, remove_drafts, write_json
from megatron_tide.hosting.backend import TeacherBackend
from megatron_tide.hosting.build import build_teacher, hosting_of
from megatron_tide.hosting.cached import (
    ADDED,
    FORMAT,
    MANIFEST,
    SETTINGS,
    SETTINGS_FORM,
    SampleOutputs,
    cache_settings,
    read_manifest,
    read_outputs,
    sample_outputs,
    shard_path,
    widths,
    write_outputs,
)
from megatron_tide.hosting.plan import local_machine, nvme_folder, plan, run_shape, teacher_needs
from megatron_tide.hosting.speed import Rates
from megatron_tide.models import read_config, resolve_folder
from megatron_tide.models.shards import ShardedFolder, same_model
from megatron_tide.screen import clock_text
from megatron_tide.train.build import check_shift, check_teacher
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.inputs import RunInputs
from megatron_tide.train.loop import StopRequest
from megatron_tide.train.microbatches import MicrobatchLoader, ahead
from megatron_tide.train.step import TrainContext, to_device

SHARD_BYTES = 64 * 10**6
LOOKED_AT = 8  # steps that the forecast counts tokens of


@dataclass(frozen=True)
class Forecast:
    """What filling a cache takes: tokens, pairs, bytes and (planned) seconds per step, and the steps of all seeds."""

    tokens: float
    pairs: float
    step_bytes: float
    steps: int
    seconds: float

    @property
    def bytes(self) -> float:
        return self.step_bytes * self.steps

    def __str__(self) -> str:
        each = self.step_bytes / max(self.tokens, 1.0)
        rows = f" and {self.pairs:,.0f} distributions" if self.pairs else ""
        size = f"{self.bytes / 1e9:,.1f} GB" if self.bytes > 1e9 else f"{self.bytes / 1e6:,.1f} MB"
        hours = timedelta(seconds=round(self.steps * self.seconds))
        return (
            f"{self.steps} steps of {self.tokens:,.0f} scored tokens{rows}: {size} ({each:,.0f} bytes per token), "
            f"{hours} (h:min:s) by the plan"
        )


def forecast(config: DistillConfig, inputs: RunInputs, loader: MicrobatchLoader, seeds: int, rates: Rates) -> Forecast:
    """Counted in a few steps of the first rank's ``loader``; no weights are loaded.

    Raises:
        ValueError: the teacher does not fit into the memory of this machine.
    """
    steps, ranks = inputs.with_teacher, loader.sampler.world
    looked = np.unique(np.linspace(steps.start, steps.stop - 1, LOOKED_AT).astype(int)).tolist()
    asked = [batch for step in looked for batch in loader(step)]
    counts = (sum(len(getattr(b, name)) for b in asked) for name in ("teacher_targets", "pair_chunk", "keys"))
    tokens, pairs, samples = (ranks * count / len(looked) for count in counts)
    shape = widths(inputs.strategy, *_vocabularies(config))
    size = 4 * tokens * inputs.strategy.needs_target_logprobs + 4 * pairs * (shape["categories"] + shape["kept"])
    longest = inputs.data.stats.student_length.max(), inputs.data.stats.teacher_length.max()
    run = run_shape(config, ranks, teacher_needs(config.strategy, _shared(inputs), *map(int, longest)))
    hosting = hosting_of(config.teacher, ranks)
    machine = local_machine(ranks, nvme_folder(hosting.settings, config.teacher.teacher_nvme))
    planned = plan(run, machine, hosting, rates, trains=False)
    if not (planned.fits or config.teacher.skip_plan):
        raise ValueError(
            f"{hosting.flags} does not fit: {planned.complaint()}; `python -m megatron_tide plan` shows what does "
            "(--skip-plan skips this check)"
        )
    pairs *= shape["categories"] > 0
    return Forecast(tokens, pairs, size + 40 * samples, seeds * len(steps), planned.seconds)


def _vocabularies(config: DistillConfig) -> tuple[int, int]:
    """The number of logits of student and teacher."""
    student, teacher = (read_config(resolve_folder(path))[1] for path in (config.paths.student, config.paths.teacher))
    return student.vocab_size, teacher.vocab_size


def _shared(inputs: RunInputs) -> bool:
    sides = (inputs.data.manifest[side]["fingerprint"] for side in ("student", "teacher"))
    return len(set(sides)) == 1


def refuse_small_disk(folder: Path, expected: Forecast) -> None:
    """ValueError where the disk has less free space than the outputs take."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if expected.bytes > free:
        raise ValueError(
            f"{folder}: {expected}, but {free / 1e9:.3g} GB are free; use --teacher-top, fewer steps or another disk"
        )


@dataclass(frozen=True)
class CacheFill:
    """One cache to fill: the teacher, and where its outputs go. ``settings`` as in the folder's settings.json."""

    folder: Path
    backend: TeacherBackend
    inputs: RunInputs
    world: DistContext
    settings: dict[str, Any]
    student_width: int
    steps_per_forward: int

    @property
    def per_shard(self) -> int:
        return int(self.settings["steps_per_shard"])

    def shards(self) -> list[tuple[int, range]]:
        """(number, steps) of each shard of a seed: the steps with a teacher, cut at multiples of ``per_shard``."""
        asked, size = self.inputs.with_teacher, self.per_shard
        numbers = range(asked.start // size, math.ceil(asked.stop / size))
        return [(n, range(max(asked.start, n * size), min(asked.stop, (n + 1) * size))) for n in numbers]

    def record(self, seed: int, steps: range) -> dict[str, Any]:
        return {"settings": fingerprint(self.settings), "seed": seed, "steps": [steps.start, steps.stop]}

    def finished(self, seed: int, number: int, steps: range) -> bool:
        """Whether a shard is there, complete, and of this cache (reads the file)."""
        try:
            shard = read_outputs(shard_path(self.folder, seed, number))
        except ValueError:
            return False
        mine = self.record(seed, steps)
        return {name: shard.record.get(name) for name in mine} == mine and shard.intact()

    def missing(self, seed: int) -> list[tuple[int, range]]:
        """The shards of a seed that are still to be made: rank 0 looks for all ranks."""
        return self.world.on_main(
            lambda: [(number, steps) for number, steps in self.shards() if not self.finished(seed, number, steps)]
        )

    def ask(self, loader: MicrobatchLoader, steps: range, stop: StopRequest) -> list[SampleOutputs] | None:
        """All ranks' outputs of ``steps``, on rank 0; None where a rank got a stop signal."""
        said: list[SampleOutputs] = []

        def load(part: range) -> list[DistillBatch]:
            return [batch for step in part for batch in loader(step)]

        for batches in ahead(load, _parts(steps, self.steps_per_forward)):
            self.world.trace.heartbeat(steps.start + 1)
            if self.world.sum_over_ranks([float(bool(stop.signal))])[0]:
                return None
            said += self._gathered(to_device(batches, self.world.device))
        return said

    def _gathered(self, batches: list[DistillBatch]) -> list[SampleOutputs]:
        outputs = self.backend.score(batches)
        strategy, width = self.inputs.strategy, self.student_width
        mine = [one for pair in zip(batches, outputs) for one in sample_outputs(*pair, strategy, width)]
        return [one for of_rank in self.world.gather_object_to_main(mine) for one in of_rank]


def _parts(steps: range, size: int) -> Iterator[range]:
    return (steps[start : start + size] for start in range(0, len(steps), size))


def fill_cache(
    config: DistillConfig,
    inputs: RunInputs,
    loader: MicrobatchLoader,
    world: DistContext,
    expected: Forecast,
    *,
    seeds: tuple[int, ...],
    steps_per_forward: int,
    stop: StopRequest,
) -> dict[str, Any] | None:
    """Make what is missing of a folder of outputs; its manifest, or None where a signal stopped it.

    Raises:
        ValueError: the folder is of other settings, or the teacher is no better than chance.
    """
    folder = Path(config.paths.out)
    settings = world.on_main(lambda: _claim(config, inputs, folder, expected))
    check_shift(config, world)
    backend = build_teacher(config.paths.teacher, config.teacher, inputs.strategy, world)
    job = CacheFill(folder, backend, inputs, world, settings, _vocabularies(config)[0], steps_per_forward)
    if not config.teacher.skip_teacher_probe:
        _probe(config, job, loader)
    wanted: list[int] = world.on_main(lambda: [seed for seed in seeds if not _covered(job, seed)])
    todo = [(seed, number, steps) for seed in wanted for number, steps in job.missing(seed)]
    total, done, since = sum(len(steps) for *_, steps in todo), 0, time.monotonic()
    for seed, number, steps in todo:
        said = job.ask(_of_seed(loader, seed), steps, stop)
        if said is None:
            return None
        path, record = shard_path(folder, seed, number), job.record(seed, steps)
        world.on_main(partial(write_outputs, path, said, record))
        done += len(steps)
        left = (time.monotonic() - since) / done * (total - done)
        world.print_rank0(f"seed {seed}: step {steps.stop}/{inputs.steps.stop}  left {clock_text(left)}")
    return world.on_main(lambda: _finish(job, wanted))


def _probe(config: DistillConfig, job: CacheFill, loader: MicrobatchLoader) -> None:
    inputs, world = job.inputs, job.world
    context = TrainContext(None, job.backend, inputs.strategy, world, Clock(world.device))
    first = loader(inputs.with_teacher.start)
    check_teacher(context, first, config.paths.teacher, inputs.data.manifest["teacher"])


def _of_seed(loader: MicrobatchLoader, seed: int) -> MicrobatchLoader:
    own = loader.sampler
    sampler = DistributedBatchSampler(loader.data.stats, own.global_batch_size, own.micro_batch_size, own.world, seed)
    return replace(loader, sampler=sampler, seed=seed)


def _claim(config: DistillConfig, inputs: RunInputs, folder: Path, expected: Forecast) -> dict[str, Any]:
    """The settings of the folder: written, or read and compared where it was begun."""
    run, path = inputs.run, folder / SETTINGS
    mine = cache_settings(
        config, inputs.strategy, run["data_fingerprint"], run["bridge_fingerprint"], inputs.total_steps
    )
    mine["teacher"] = ShardedFolder(resolve_folder(config.paths.teacher)).fingerprint(every_byte=True)
    mine |= widths(inputs.strategy, *_vocabularies(config))
    per_shard = max(1, int(SHARD_BYTES // max(expected.step_bytes, 1)))
    refuse_foreign(folder, [MANIFEST], SETTINGS, "a cache")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, "steps_per_shard": per_shard, **mine})
    remove_drafts(folder)
    found = read_json(path, "remove the folder, or use another --out", SETTINGS_FORM)
    for name, value in {"format": FORMAT, **mine}.items():
        before = found.get(name, ADDED.get(name))
        if before != value and not (name == "teacher" and same_model(before, value)):
            raise ValueError(
                f"{folder}: begun with {name} = {before!s:.40}, now it is {value!s:.40}; use another --out"
            )
    return found


def _known(job: CacheFill) -> dict[str, Any]:
    """The seeds that the folder has already, with their steps and shards."""
    try:
        before = read_manifest(job.folder)
    except ValueError:  # none yet, or a corrupt one: its finished shards are kept all the same
        return {}
    return dict(before["seeds"]) if before["settings"] == job.settings else {}


def _covered(job: CacheFill, seed: int) -> bool:
    """Whether what the folder has of a seed is there, and enough."""
    asked = job.inputs.with_teacher
    filled = _known(job).get(str(seed))
    if filled is None or filled["first"] > asked.start or filled["end"] < asked.stop:
        return False
    size, own = job.per_shard, range(filled["first"], filled["end"])
    cut = {n: range(max(own.start, n * size), min(own.stop, (n + 1) * size)) for n in filled["shards"]}
    return all(job.finished(seed, number, steps) for number, steps in cut.items())


def _finish(job: CacheFill, seeds: list[int]) -> dict[str, Any]:
    """Write the manifest: the seeds that the folder has had before stay in it."""
    asked = job.inputs.with_teacher
    steps = {"first": asked.start, "end": asked.stop}
    numbers = [number for number, _ in job.shards()]
    every = _known(job) | {str(seed): {**steps, "seed": seed, "shards": numbers} for seed in seeds}
    pairs, outside, kept = 0, 0.0, job.settings["kept"]
    for filled in every.values() if kept else ():
        for number in filled["shards"]:
            arrays = read_outputs(shard_path(job.folder, filled["seed"], number)).arrays
            rest = arrays["scores"].reshape(-1, kept + 1)[:, -1]
            pairs, outside = pairs + len(rest), outside + float(np.exp(rest, dtype=np.float64).sum())
    covered = 1 - outside / max(pairs, 1) if kept else None
    name = job.inputs.run["config"]["paths"]["teacher"]
    manifest = {"format": FORMAT, "settings": job.settings, "seeds": every, "covered_mass": covered}
    manifest |= {"teacher_name": name}
    manifest["fingerprint"] = fingerprint(manifest)
    write_json(job.folder / MANIFEST, manifest)
    return manifest
