"""Train a block-diffusion student: by distillation, or without a teacher (--strategy bd3lm).

The same command, run again, resumes from the newest checkpoint. Ctrl-C finishes the current step, saves, and stops. Any
number of ranks gives the same curve. Data and bridge come from the prepare and bridge commands; the convert command
makes the release.

Examples:
  python -m megatron_tide distill --student DIR --teacher DIR --bridge DIR --data DIR --out runs/NAME
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nproc-per-node 8 --rdzv-backend c10d --rdzv-conf store_type=file \\
      --local-addr 127.0.0.1 -m megatron_tide.distill --config runs/NAME/tide-cross/run.json --out runs/OTHER
  deepspeed --module megatron_tide.distill --student DIR --data DIR --out runs/NAME --strategy bd3lm --dry-run
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from megatron_tide import cli
from megatron_tide.config import DistillArgs, DistillConfig, preset_and_file
from megatron_tide.errors import EXIT_INTERRUPTED
from megatron_tide.files import write_json

Args, defaults = DistillArgs, preset_and_file


def run(args: DistillArgs) -> int:
    args.run.check()
    if args.dry_run:
        return dry_run(args.run)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    from megatron_tide.train.watchdog import group_for_a_run

    with group_for_a_run(args.run.save.hang_timeout) as world:
        return train(args.run, world)


def dry_run(config: DistillConfig) -> int:
    """Everything that can be checked without loading weights; prints the run."""
    from megatron_tide.gpus import refuse_idle_gpu
    from megatron_tide.train.build import check_models
    from megatron_tide.train.distributed import launched_ranks
    from megatron_tide.train.inputs import read_run_inputs

    refuse_idle_gpu()
    inputs = read_run_inputs(config, launched_ranks())
    check_models(config, inputs)
    cli.say(inputs.note, end="\n" * bool(inputs.note), file=sys.stderr)
    print(json.dumps({**inputs.run, "data": inputs.data.fingerprint}, indent=1))
    steps = f"{len(inputs.steps)} steps of {config.train.global_batch_size} samples"
    cli.say(f"dry run: {len(inputs.data)} samples, {steps}: OK")
    return 0


def train(config: DistillConfig, world: Any) -> int:
    from megatron_tide.lock import locked
    from megatron_tide.train import build
    from megatron_tide.train.inputs import read_run_inputs
    from megatron_tide.train.loop import Loop, StopRequest

    stop = StopRequest()
    stop.install()  # a signal while models load ends the run before its first step
    inputs = read_run_inputs(config, world.size)
    if inputs.note:
        world.print_rank0(inputs.note)
    out = Path(config.paths.out)
    with locked(out, world):
        world.on_main(lambda: build.refuse_other_folder(out))
        context, loader = build.build(config, inputs, world)
        build.record_models(config, inputs, world)
        state = build.starting_point(config, inputs, context)
        build.check_compiled(config, context, loader, state)
        build.probe(config, inputs, context, loader, state)
        world.on_main(lambda: write_json(out / "run.json", inputs.run))
        measure = build.measurement(config, inputs, context)
        state = Loop(config, context, loader, inputs.run).train(state, stop, measure)
    finished = state.step == inputs.steps.stop
    how = "finished" if finished else "stopped on request, checkpoint saved; run the same command again to continue"
    world.print_rank0(f"step {state.step}/{inputs.steps.stop}: {how} ({out})")
    return 0 if finished else EXIT_INTERRUPTED


def main(argv: list[str]) -> int:
    return cli.call(sys.modules[__name__], argv, f"{cli.PROGRAM}.distill")


if __name__ == "__main__":
    cli.run(main)
