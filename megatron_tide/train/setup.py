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
from megatron_tide.diffusion import CONTEXTS, TeacherView
from megatron_tide.hosting.place import host_teacher
from megatron_tide.hosting.plan.check import check_plan
from megatron_tide.hosting.resident import NoTeacher
from megatron_tide.models import load_model, recompute_layers
from megatron_tide.train import checkpoint
from megatron_tide.train.checkpoint import TrainState
from megatron_tide.train.engine import build_engine
from megatron_tide.train.inputs import Inputs
from megatron_tide.train.probe import probe_teacher
from megatron_tide.train.step import Parts
from megatron_tide.train.windows import Windows
from megatron_tide.train.world import World


def build(config: DistillConfig, inputs: Inputs, world: World, host: Any = None) -> tuple[Parts, Windows]:
    """Load the models, start the engine, place the teacher; or take ``host``, one that is placed already.

    Raises:
        ValueError: also for a run that cannot fit here, before anything is loaded.
    """
    if host is None:
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
    strategy, view = inputs.strategy, None
    if not strategy.needs_teacher:
        host = NoTeacher()
    else:
        host = host or host_teacher(config.paths.teacher, config.teacher, strategy, world)
        view = TeacherView(
            context=CONTEXTS[config.strategy.teacher_context],
            block=inputs.data.manifest["teacher"]["block"],
            mask_id=inputs.data.manifest["teacher"]["mask_id"],
            compdemo=strategy.compdemo,
        )
    windows = Windows(
        data=inputs.data,
        order=inputs.order,
        masking=strategy.masking,
        teacher=view,
        seed=config.train.seed,
        rank=world.rank,
        pin_memory=world.device.type == "cuda",
    )
    parts = Parts(engine=engine, host=host, strategy=strategy, world=world, clock=Clock(world.device))
    return parts, windows


def probe(config: DistillConfig, inputs: Inputs, parts: Parts, windows: Windows, state: TrainState) -> None:
    """Before a run's first step, refuse a teacher that knows no more than chance (``probe_teacher``'s ValueError)."""
    if state.step or config.teacher.skip_teacher_probe or not inputs.strategy.needs_teacher:
        return
    side = inputs.data.manifest["teacher"]
    mean = probe_teacher(parts, windows(0), side["vocab_size"], config.paths.teacher, side["mask_id"])
    uniform = -math.log(side["vocab_size"])
    parts.world.say(f"teacher: {mean:.2f} nats a gold token on the first window; a uniform guess is {uniform:.2f}")


def measurement(config: DistillConfig, inputs: Inputs, parts: Parts) -> Callable[[], dict[str, float]]:
    """What ``--eval-every`` measures: the student's held-out values (a collective)."""

    def measure() -> dict[str, float]:
        from megatron_tide.evaluate import student_side, validate

        held_out, batch = inputs.validation, config.train.micro_batch
        assert held_out is not None
        side, samples = student_side(held_out), config.save.eval_samples
        return validate(parts.engine.module, held_out, side, world=parts.world, samples=samples, batch_size=batch)

    return measure


def starting_point(config: DistillConfig, inputs: Inputs, parts: Parts) -> TrainState:
    """Where to begin: ``--resume`` decides; a checkpoint of another run is refused.

    Raises:
        ValueError: naming the first knob or fingerprint that differs, or the folder that is already in use.
    """
    start = TrainState(step=0, total_steps=inputs.total_steps)
    folder = _resume_folder(config, parts.world)
    if folder is None:
        return start
    refuse_other_run(folder, inputs.run)
    state = checkpoint.restore(folder, parts.engine)
    parts.world.say(f"resuming from {folder} at step {state.step}/{state.total_steps}")
    return state


def _resume_folder(config: DistillConfig, world: World) -> Path | None:
    out, resume = Path(config.paths.out), config.save.resume
    if resume == "never":
        if any(out.glob(f"{checkpoint.PREFIX}*")):
            raise ValueError(f"--resume never: {out} already holds checkpoints; take another --out or --resume auto")
        return None
    if resume != "auto":
        checkpoint.verify(Path(resume))
        return Path(resume)
    # Rank 0 checks the sums once for all: the files are shared, reading them world times is not a better check.
    found = world.share_from_main(checkpoint.newest_whole(out, world.say) if world.is_main else None)
    if found is None and any(out.glob(f"{checkpoint.PREFIX}*")):
        raise ValueError(f"{out}: none of its checkpoints is whole; remove them to start over, or take another --out")
    return found


def refuse_other_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse a checkpoint whose run had other curve-deciding knobs, data or bridge."""
    theirs = checkpoint.read_description(folder)["run"]
    for knob, mine in run["deciding"].items():
        if theirs["deciding"].get(knob) != mine:
            raise ValueError(
                f"{folder} was trained with {knob} = {theirs['deciding'].get(knob)!r}, this run has {mine!r}: "
                f"take that value, another --out, or remove the folder"
            )
    for what in ("data_fingerprint", "bridge_fingerprint", "total_steps"):
        if theirs[what] != run[what]:
            raise ValueError(f"{folder} was trained with another {what.split('_')[0]}: take another --out, or that one")
