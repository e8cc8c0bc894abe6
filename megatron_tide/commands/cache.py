"""Store a teacher's outputs for a whole training: a folder for distill --teacher-hosting cached.

Takes the flags of the training, with another --out. Noise depends on (seed, epoch, sample) alone, so the outputs hold
for any student, objective at the same temperature, restart and number of ranks. Training then needs no teacher, and its
curve is the one with the teacher. Run the same command again to continue; --seeds adds seeds. --dry-run predicts disk
space and time. Distributions over a large vocabulary need --teacher-top, here and in training.

Examples:
  python -m megatron_tide cache --student DIR --teacher DIR --bridge DIR --data DIR --out runs/cache --dry-run
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 8 --rdzv-backend c10d --rdzv-conf store_type=file \\
      --local-addr 127.0.0.1 -m megatron_tide cache --config runs/NAME/tide-cross/run.json --out runs/cache --seeds 1 2
  python -m megatron_tide distill --teacher-hosting cached --teacher-cache runs/cache --student DIR --bridge DIR ...
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tide.cli import SEEDS, flag, say
from megatron_tide.config import CACHED, DistillArgs, DistillConfig, preset_and_file
from megatron_tide.errors import EXIT_INTERRUPTED
from megatron_tide.hosting.speed import Rates

defaults = preset_and_file


@dataclass(frozen=True, kw_only=True)
class Args(DistillArgs):
    """Arguments of the cache command: the training that the outputs are for, and how the teacher runs."""

    seeds: tuple[int, ...] = flag((), "Seeds of the trainings", shown="--seed", **SEEDS)
    steps_per_forward: int = flag(1, "Training steps per teacher forward: offloaded weights are read less often", low=1)
    rates: Rates = field(default_factory=Rates)


def run(args: Args) -> int:
    config = args.run
    config.check()
    if config.teacher.teacher_hosting == CACHED:
        raise ValueError("--teacher-hosting cached: there is no teacher to ask; leave it out, or use another hosting")
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    from megatron_tide.train.distributed import launched_ranks
    from megatron_tide.train.watchdog import group_for_a_run

    if args.dry_run:
        predict(config, args, launched_ranks())
        return 0
    with group_for_a_run(config.save.hang_timeout) as world:
        return ask(config, args, world)


def predict(config: DistillConfig, args: Args, ranks: int) -> Any:
    """Print the disk space and time it will take. ValueError where the disk is too small, or no teacher is needed."""
    import torch

    from megatron_tide.train.build import make_loader
    from megatron_tide.train.distributed import DistContext
    from megatron_tide.train.fill_cache import forecast, refuse_small_disk
    from megatron_tide.train.inputs import read_run_inputs

    inputs = read_run_inputs(config, ranks)
    if not inputs.strategy.needs_teacher:
        raise ValueError(f"--strategy {config.strategy.strategy} asks no teacher; name one that distils")
    alone = DistContext(rank=0, size=ranks, device=torch.device("cpu"), host_group=None)
    loader = make_loader(config, inputs, alone)
    expected = forecast(config, inputs, loader, len(_seeds(config, args)), args.rates)
    say(f"{config.paths.out}: {expected}", flush=True)
    refuse_small_disk(Path(config.paths.out), expected)
    return expected


def _seeds(config: DistillConfig, args: Args) -> tuple[int, ...]:
    """Each once, however often it is named."""
    return tuple(dict.fromkeys(args.seeds or (config.train.seed,)))


def ask(config: DistillConfig, args: Args, world: Any) -> int:
    from megatron_tide.lock import locked
    from megatron_tide.train.build import make_loader
    from megatron_tide.train.fill_cache import fill_cache
    from megatron_tide.train.inputs import read_run_inputs
    from megatron_tide.train.loop import StopRequest

    stop = StopRequest()
    stop.install()
    expected = world.on_main(lambda: predict(config, args, world.size))
    inputs, out = read_run_inputs(config, world.size), Path(config.paths.out)
    loader = make_loader(config, inputs, world)
    seeds = _seeds(config, args)
    with locked(out, world):
        manifest = fill_cache(
            config, inputs, loader, world, expected, seeds=seeds, steps_per_forward=args.steps_per_forward, stop=stop
        )
    if manifest is None:
        world.print_rank0(f"stopped on request; run the same command again to continue ({out})")
        return EXIT_INTERRUPTED
    mass = manifest["covered_mass"]
    covered = "" if mass is None else f", {mass:.2%} of the teacher's mass in the categories compared singly"
    stored = ", ".join(f"{seed} ({part['end'] - part['first']} steps)" for seed, part in manifest["seeds"].items())
    world.print_rank0(f"finished: teacher outputs for seed {stored}{covered} ({out})")
    return 0
