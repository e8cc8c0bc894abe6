"""Train a block-diffusion student: with a teacher (distillation), or without (--strategy bd3lm: pretraining, baseline).

    python -m megatron_tide.distill --student DIR --teacher DIR --bridge DIR --data DIR --out runs/NAME
    torchrun --nproc-per-node 8 -m megatron_tide.distill ...        any number of ranks gives the same curve
    deepspeed --module megatron_tide.distill ...

Run again, it goes on from its newest checkpoint. Ctrl-C finishes the step, saves, and stops. Data and bridge come from
`python -m megatron_tide.data.prepare` and `python -m megatron_tide.bridge`; `tools/convert_to_hf.py` makes the release.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_tide import cli
from megatron_tide.config import DistillConfig, parse
from megatron_tide.files import write_json

EXIT_STOPPED = 130


def main(argv: list[str]) -> int:
    config, arguments = parse(argv, __doc__ or "")
    if arguments.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(arguments.local_rank))
    if arguments.dry_run:
        return dry_run(config)
    from megatron_tide.train.distributed import destroy_distributed, init_distributed

    world = init_distributed()
    try:
        return train(config, world)
    finally:
        destroy_distributed()


def dry_run(config: DistillConfig) -> int:
    """Everything that can be checked without loading weights; prints the run."""
    from megatron_tide.train.distributed import launched_ranks
    from megatron_tide.train.inputs import read_run_inputs

    inputs = read_run_inputs(config, launched_ranks())
    print(json.dumps({**inputs.run, "data": inputs.data.fingerprint}, indent=1))
    steps = f"{inputs.total_steps} steps of {config.train.global_batch_size} samples"
    print(f"dry run: {len(inputs.data)} samples, {steps}: OK")
    return 0


def train(config: DistillConfig, world: Any) -> int:
    from megatron_tide.lock import locked
    from megatron_tide.train import build
    from megatron_tide.train.inputs import read_run_inputs
    from megatron_tide.train.loop import Loop, StopRequest
    from megatron_tide.train.watchdog import HangWatchdog

    stop = StopRequest()
    stop.install()  # asked while models load: it ends before its first step
    inputs = read_run_inputs(config, world.size)
    out = Path(config.paths.out)
    with locked(out, world), HangWatchdog(world, config.save.hang_timeout):
        context, loader = build.build(config, inputs, world)
        state = build.starting_point(config, inputs, context)
        build.probe(config, inputs, context, loader, state)
        if world.is_main:
            write_json(out / "run.json", inputs.run)
        measure = build.measurement(config, inputs, context)
        state = Loop(config, context, loader, inputs.run).train(state, stop, measure)
    finished = state.step == state.total_steps
    how = "finished" if finished else "stopped as asked, saved; the same command goes on from here"
    world.print_rank0(f"step {state.step}/{state.total_steps}: {how} ({out})")
    return 0 if finished else EXIT_STOPPED


if __name__ == "__main__":
    cli.run(main)
