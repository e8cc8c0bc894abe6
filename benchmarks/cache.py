"""A training step with the teacher against the same step with its outputs from disk, and what these take.

Given the flags of a training (--config runs/quickstart/tide-bridge/run.json): the teacher runs on --steps of its steps,
as in the cache command; then the same steps are trained in turn with the teacher and from its outputs. Losses of
both must agree before anything is timed. One rank; the optimizer's update is left out of neither.

Seconds of filling are of running the teacher and writing; bytes are of the files, per scored token of the teacher, per
distribution, and per token of the student's text. A training from a cache saves (live - cached) seconds per step,
filling costs its own: ``trainings_to_pay`` of the same inputs are needed before it pays on this machine. On a machine
that others use as well, ``--busy`` counts CPU seconds of one thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.common import paired_seconds, report
from megatron_tide import cli
from megatron_tide.cli import flag
from megatron_tide.config import DistillArgs, DistillConfig, preset_and_file
from megatron_tide.hosting.speed import RATES


@dataclass(frozen=True, kw_only=True)
class Args(DistillArgs):
    """Arguments of the benchmark: the training, and how much of it."""

    steps: int = flag(16, "Number of steps that the teacher runs on, and that are trained each way", low=2)
    rounds: int = flag(3, "Number of times that each step is timed each way", low=1)
    busy: bool = flag(False, "Time one thread's CPU seconds, not those of the clock")
    json: str = flag("", "Also write the figures to FILE", metavar="FILE")


defaults = preset_and_file


def run(args: Args) -> int:
    import torch

    from megatron_tide.train.distributed import init_distributed

    if args.busy:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train = replace(args.run.train, max_steps=args.steps)
        paths = replace(args.run.paths, out=str(Path(folder) / "answers"))
        config = replace(args.run, train=train, paths=paths)
        report("cache", figures(config, args, init_distributed()), args.json or None)
    return 0


def figures(config: DistillConfig, args: Args, world: Any) -> dict[str, Any]:
    from megatron_tide.hosting.cached import CachedTeacher, OutputCache
    from megatron_tide.train import build
    from megatron_tide.train.fill_cache import fill_cache, forecast
    from megatron_tide.train.inputs import read_run_inputs
    from megatron_tide.train.loop import StopRequest
    from megatron_tide.train.step import global_counts, to_device, train_step

    inputs = read_run_inputs(config, world.size)
    loader = build.make_loader(config, inputs, world)
    expected = forecast(config, inputs, loader, 1, RATES)
    clock = time.process_time if args.busy else time.perf_counter
    began = clock()
    seeds = (config.train.seed,)
    fill_cache(config, inputs, loader, world, expected, seeds=seeds, steps_per_forward=1, stop=StopRequest())
    filling = (clock() - began) / args.steps
    context, _ = build.build(config, inputs, world)
    cached = replace(context, backend=CachedTeacher(OutputCache.open(config.paths.out), inputs.strategy))
    steps = [to_device(loader(step), world.device) for step in range(args.steps)]
    _must_agree(inputs.strategy, context, cached, steps)

    def way(one: Any) -> None:
        for number, batches in enumerate(steps):
            train_step(one, batches, global_counts(batches, world, False)[0], number / args.steps)

    live_seconds, cached_seconds = paired_seconds([lambda: way(context), lambda: way(cached)], args.rounds, clock=clock)
    files = sum(path.stat().st_size for path in Path(config.paths.out).glob("*.arrow"))
    counts = [(len(b.teacher_targets), len(b.pair_chunk), b.tokens) for batches in steps for b in batches]
    scored, pairs, tokens = (sum(column) for column in zip(*counts))
    live, stored = live_seconds / args.steps, cached_seconds / args.steps
    return {
        "strategy": config.strategy.strategy,
        "seconds_are": "of one thread's CPU" if args.busy else "of the clock",
        "teacher_top": config.strategy.teacher_top,
        "bytes": files,
        "forecast_bytes": expected.bytes,
        "bytes_per_scored_token": files / scored,
        "bytes_per_student_token": files / tokens,
        "distributions_per_scored_token": pairs / scored,
        "fill_seconds_per_step": filling,
        "step_seconds_with_teacher": live,
        "step_seconds_from_answers": stored,
        "speed_up": live / stored,
        "trainings_to_pay": filling / max(live - stored, 1e-9),
    }


def _must_agree(strategy: Any, live: Any, cached: Any, steps: Any) -> None:
    """The distillation loss of every micro-batch, with the student's first weights."""
    import torch

    from megatron_tide.models import masked_hidden_states
    from megatron_tide.objectives import Counts

    model, counts = live.engine.module, Counts(maskable=1.0, chunks=1.0, pairs=1.0)
    for batches in steps:
        for batch, *said in zip(batches, live.backend.score(batches), cached.backend.score(batches)):
            strength, losses = strategy.strength(0.5, batch.rate), []
            with torch.no_grad():
                hidden = masked_hidden_states(model, batch.student)
                for outputs in said:
                    scores = strategy.score(hidden, model.head_weight, batch, outputs, strength)
                    losses.append(strategy.loss(scores, outputs, batch, strength, counts)[0])
            torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


def main(argv: list[str]) -> int:
    return cli.call(sys.modules[__name__], argv, "python -m benchmarks.cache")


if __name__ == "__main__":
    cli.run(main)
