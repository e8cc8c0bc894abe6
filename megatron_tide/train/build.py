"""From checked inputs to the parts of a run: load, build, probe.

Every refusal happens before the first step, on every rank alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tide.clock import Clock
from megatron_tide.config import DistillConfig
from megatron_tide.diffusion import ATTENTION_LAYOUTS, TeacherLayout
from megatron_tide.hosting.place import build_teacher
from megatron_tide.hosting.plan.check import check_plan
from megatron_tide.hosting.replicated import NoTeacher
from megatron_tide.models import load_model, recompute_layers
from megatron_tide.train import checkpoint
from megatron_tide.train.checkpoint import TrainState
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.engine import build_engine
from megatron_tide.train.inputs import RunInputs
from megatron_tide.train.microbatches import MicrobatchLoader
from megatron_tide.train.step import TrainContext
from megatron_tide.train.teacher_probe import check_teacher


def build(
    config: DistillConfig, inputs: RunInputs, world: DistContext, backend: Any = None
) -> tuple[TrainContext, MicrobatchLoader]:
    """Load the models, start the engine, place the teacher; or take ``backend``, one that is placed already.

    Raises:
        ValueError: also for a run that cannot fit here, before anything is loaded.
    """
    if backend is None:
        check_plan(config, inputs.strategy, inputs.data.stats, world)
    model = load_model(config.paths.student).train()
    block = inputs.data.manifest["student"]["block"]
    if model.config.block_size != block:
        raise ValueError(
            f"{inputs.data.folder}: prepared for blocks of {block} tokens, {config.paths.student} has "
            f"{model.config.block_size}; prepare with --student-block {model.config.block_size}"
        )
    if config.train.activation_checkpointing:
        recompute_layers(model)
    engine = build_engine(model, config, world)
    strategy, layout = inputs.strategy, None
    if not strategy.needs_teacher:
        backend = NoTeacher()
    else:
        backend = backend or build_teacher(config.paths.teacher, config.teacher, strategy, world)
        layout = TeacherLayout(
            context=ATTENTION_LAYOUTS[config.strategy.teacher_context],
            block=inputs.data.manifest["teacher"]["block"],
            mask_id=inputs.data.manifest["teacher"]["mask_id"],
            compdemo=strategy.compdemo,
        )
    loader = MicrobatchLoader(
        data=inputs.data,
        sampler=inputs.sampler,
        noise_schedule=strategy.noise_schedule,
        masking=strategy.masking,
        teacher=layout,
        seed=config.train.seed,
        rank=world.rank,
        pin_memory=world.device.type == "cuda",
    )
    context = TrainContext(engine=engine, backend=backend, strategy=strategy, world=world, clock=Clock(world.device))
    return context, loader


def probe(
    config: DistillConfig, inputs: RunInputs, context: TrainContext, loader: MicrobatchLoader, state: TrainState
) -> None:
    """Before a run's first step, refuse a teacher that knows no more than chance (``check_teacher``'s ValueError)."""
    if state.step or config.teacher.skip_teacher_probe or not inputs.strategy.needs_teacher:
        return
    side = inputs.data.manifest["teacher"]
    mean = check_teacher(context, loader(0), side["vocab_size"], config.paths.teacher, side["mask_id"])
    uniform = -math.log(side["vocab_size"])
    context.world.print_rank0(
        f"teacher: {mean:.2f} nats a gold token on the first window; a uniform guess is {uniform:.2f}"
    )


def measurement(config: DistillConfig, inputs: RunInputs, context: TrainContext) -> Callable[[], dict[str, float]]:
    """What ``--eval-every`` measures: the student's held-out values (a collective)."""

    def measure() -> dict[str, float]:
        from megatron_tide.evaluate import student_side, validate

        held_out, batch = inputs.validation, config.train.micro_batch_size
        assert held_out is not None
        side, samples = student_side(held_out), config.save.eval_samples
        return validate(context.engine.module, held_out, side, world=context.world, samples=samples, batch_size=batch)

    return measure


def starting_point(config: DistillConfig, inputs: RunInputs, context: TrainContext) -> TrainState:
    """Where to begin: ``--resume`` decides; a checkpoint of another run is refused.

    Raises:
        ValueError: naming the first knob or fingerprint that differs, or the folder that is already in use.
    """
    start = TrainState(step=0, total_steps=inputs.total_steps)
    folder = _resume_folder(config, context.world)
    if folder is None:
        return start
    refuse_other_run(folder, inputs.run)
    state = checkpoint.restore(folder, context.engine)
    context.world.print_rank0(f"resuming from {folder} at step {state.step}/{state.total_steps}")
    return state


def _resume_folder(config: DistillConfig, world: DistContext) -> Path | None:
    out, resume = Path(config.paths.out), config.save.resume
    if resume == "never":
        if any(out.glob(f"{checkpoint.PREFIX}*")):
            raise ValueError(f"--resume never: {out} already holds checkpoints; take another --out or --resume auto")
        return None
    if resume != "auto":
        checkpoint.verify(Path(resume))
        return Path(resume)
    # Rank 0 checks the sums once for all: the files are shared, reading them world times is not a better check.
    found = world.broadcast_object(checkpoint.newest_complete(out, world.print_rank0) if world.is_main else None)
    if found is None and any(out.glob(f"{checkpoint.PREFIX}*")):
        raise ValueError(f"{out}: none of its checkpoints is whole; remove them to start over, or take another --out")
    return found


def refuse_other_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse a checkpoint whose run had other curve-deciding knobs, data or bridge."""
    theirs = checkpoint.read_description(folder)["run"]
    for flag, mine in run["affects_loss"].items():
        if theirs["affects_loss"].get(flag) != mine:
            raise ValueError(
                f"{folder} was trained with {flag} = {theirs['deciding'].get(flag)!r}, this run has {mine!r}: "
                f"take that value, another --out, or remove the folder"
            )
    for what in ("data_fingerprint", "bridge_fingerprint", "total_steps"):
        if theirs[what] != run[what]:
            raise ValueError(f"{folder} was trained with another {what.split('_')[0]}: take another --out, or that one")
