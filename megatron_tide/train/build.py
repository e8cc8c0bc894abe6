"""Build the parts of a run from its checked inputs: models, engine, teacher backend, loader.

Every error is raised before the first step, on all ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_tide.bounds import shown
from megatron_tide.clock import Clock
from megatron_tide.config import DistillConfig
from megatron_tide.diffusion import ATTENTION_LAYOUTS, DistillBatch, TeacherLayout, mask_of, predicts_next
from megatron_tide.files import refuse_foreign, refuse_other
from megatron_tide.hosting.backend import TeacherBackend
from megatron_tide.hosting.build import build_teacher, hosting_of
from megatron_tide.hosting.plan import check_plan, model_config
from megatron_tide.hub import stated_block_size
from megatron_tide.models import (
    compile_layers,
    load_model,
    masked_hidden_states,
    read_config,
    recompute_layers,
    resolve_folder,
    target_logprobs,
)
from megatron_tide.models.shards import ShardedFolder, same_model
from megatron_tide.objectives import TeacherOutputs
from megatron_tide.train import checkpoint
from megatron_tide.train.distributed import DistContext
from megatron_tide.train.engine import build_engine
from megatron_tide.train.inputs import RunInputs
from megatron_tide.train.microbatches import MicrobatchLoader
from megatron_tide.train.step import TrainContext, to_device
from megatron_tide.training_checkpoint import (
    METRICS,
    TrainState,
    newest_complete,
    read_description,
    step_folder,
    step_folders,
    verify,
)


def build(
    config: DistillConfig, inputs: RunInputs, world: DistContext, backend: TeacherBackend | None = None
) -> tuple[TrainContext, MicrobatchLoader]:
    """Load the student, start its engine and build the teacher backend (or use ``backend``, an existing one).

    Raises:
        ValueError: for example if the run does not fit on this machine, before anything is loaded.
    """
    strategy = inputs.strategy
    world.on_all(lambda: check_models(config, inputs))
    if backend is None:
        check_plan(config, inputs.strategy, inputs.data.stats, world)
    if strategy.needs_teacher and backend is None:
        world.on_all(lambda: hosting_of(config.teacher, world.size))  # a node may lack the disk
    model = world.on_all(lambda: load_model(config.paths.student, as_student=True)).train()
    block, stated = inputs.data.manifest["student"]["block"], stated_block_size(config.paths.student)
    model.config.block_size = block
    if stated not in (None, block):
        world.print_rank0(f"blocks of {block} tokens, as {inputs.data.folder} has; {config.paths.student} had {stated}")
    if config.train.activation_checkpointing:
        recompute_layers(model)
    if compiles(config, world):
        compile_layers(model)
    engine = build_engine(model, config, world)
    if strategy.needs_teacher and inputs.cache is None:
        check_shift(config, world)
    backend = backend or build_teacher(config.paths.teacher, config.teacher, strategy, world)
    context = TrainContext(engine=engine, backend=backend, strategy=strategy, world=world, clock=Clock(world.device))
    return context, make_loader(config, inputs, world)


def check_models(config: DistillConfig, inputs: RunInputs) -> None:
    """ValueError for a folder whose config.json describes no model, or one without the data's tokens and mask."""
    named = {"student": config.paths.student, "teacher": config.paths.teacher if inputs.strategy.needs_teacher else ""}
    for side, path in named.items():
        if path:
            described = read_config(model_config(path), as_student=side == "student")[1]
            inputs.data.check_model(side, path, described)


def make_loader(config: DistillConfig, inputs: RunInputs, world: DistContext) -> MicrobatchLoader:
    """The micro-batches of this rank."""
    strategy, layout = inputs.strategy, None
    if strategy.needs_teacher:
        layout = TeacherLayout(
            context=ATTENTION_LAYOUTS[config.strategy.teacher_context],
            block=inputs.data.manifest["teacher"]["block"],
            mask_id=mask_of(inputs.data, "teacher", ATTENTION_LAYOUTS[config.strategy.teacher_context]),
            compdemo=strategy.compdemo,
            first_rows=strategy.first_rows is not None,
        )
    return MicrobatchLoader(
        data=inputs.data,
        sampler=inputs.sampler,
        phases=inputs.phases,
        noise_schedule=strategy.noise_schedule,
        noise_sampling=strategy.noise_sampling,
        masking=strategy.masking,
        teacher=layout,
        seed=config.train.seed,
        rank=world.rank,
        for_cuda=world.device.type == "cuda",
    )


def compiles(config: DistillConfig, world: DistContext) -> bool:
    """Whether the student's layers are compiled; by default with a GPU only."""
    given = config.train.compile_layers
    return world.device.type == "cuda" if given is None else given


def check_compiled(config: DistillConfig, context: TrainContext, loader: MicrobatchLoader, state: TrainState) -> None:
    """Compile the layers now, by a forward and a backward pass over the next step's first micro-batch.

    Raises:
        ValueError: they cannot be compiled here; names the flag that trains without.
    """
    if not compiles(config, context.world) or state.step >= (config.save.until_step or state.total_steps):
        return
    context.world.print_rank0("compiling the student's layers (--no-compile-layers trains without)")
    model = context.engine.module
    (batch,) = to_device(loader(state.step)[:1], context.world.device)

    def compiled() -> None:
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        try:  # no gradient is kept
            torch.autograd.grad(masked_hidden_states(model, batch.student).sum(), first)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of dynamo, inductor, Triton, a C compiler
            reason = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                f"the student's layers cannot be compiled here ({type(error).__name__}: {reason}); "
                "--no-compile-layers trains without"
            ) from error

    context.world.on_all(compiled)


def check_shift(config: DistillConfig, world: DistContext) -> None:
    """Whether the teacher's rows predict what ``--teacher-context`` reads from them: the next token, or their own."""
    teacher, context = config.paths.teacher, config.strategy.teacher_context
    family, _ = read_config(resolve_folder(teacher))
    name, is_causal = family.model_types[0], predicts_next(ATTENTION_LAYOUTS[context])
    if is_causal and not family.shifts_by_one:
        raise ValueError(
            f"--teacher-context {context}: {teacher} is a {name} model, which predicts the token AT each position from "
            "masked text; use full, block_causal or staircase"
        )
    if family.shifts_by_one and not is_causal:
        world.print_rank0(
            f"warning: {teacher} is a {name} model, which predicts the NEXT token at each position; with "
            f"--teacher-context {context} its predictions are used as for the token AT each position: use causal"
        )


def probe(
    config: DistillConfig, inputs: RunInputs, context: TrainContext, loader: MicrobatchLoader, state: TrainState
) -> None:
    """Before the first step, refuse a teacher that is no better than chance (ValueError of ``check_teacher``)."""
    if state.step or config.teacher.skip_teacher_probe or inputs.cache or not inputs.strategy.needs_teacher:
        return  # a cached teacher was probed before it was asked
    side = inputs.data.manifest["teacher"]
    mean = check_teacher(context, loader(inputs.phases.last.start), config.paths.teacher, side)
    uniform = -math.log(side["vocab_size"])
    context.world.print_rank0(
        f"teacher: {mean:.2f} nats per target token in the first step's data; a uniform guess gives {uniform:.2f}"
    )


def check_teacher(
    context: TrainContext, microbatches: Sequence[DistillBatch], teacher: str, side: Mapping[str, Any]
) -> float:
    """Mean log-prob (nats) of the target tokens of ``microbatches`` under the teacher, over all ranks (a collective).

    ``side``: the teacher's part of the data's manifest.

    Raises:
        ValueError: on all ranks, when it is not finite, or no better than a uniform guess over the vocabulary.
    """
    microbatches = to_device(microbatches, context.world.device)
    teacher_outputs = context.backend.score(microbatches)
    gold = torch.cat([_logprobs(batch, outputs).double() for batch, outputs in zip(microbatches, teacher_outputs)])
    total, count = context.world.sum_over_ranks([gold.sum().item(), float(len(gold))])
    mean, uniform = total / max(count, 1.0), -math.log(side["vocab_size"])
    if count and not mean > uniform:  # a NaN is not greater than anything
        found = f"{mean:.2f} nats" if math.isfinite(mean) else "not finite"
        wrong_mask = "" if side["mask_id"] is None else f"a wrong mask token (id {side['mask_id']}), "
        raise ValueError(
            f"{teacher}: mean log-prob of the data's tokens is {found}, a uniform guess gives {uniform:.2f}: "
            f"wrong weights, {wrong_mask}or another chat template; "
            "--skip-teacher-probe skips this check"
        )
    return mean


def _logprobs(batch: DistillBatch, outputs: TeacherOutputs) -> torch.Tensor:
    """The target log-probs of the outputs, or those of the pairs, computed from their hidden states."""
    if outputs.target_logprobs is not None:
        return outputs.target_logprobs
    assert outputs.hidden is not None
    assert outputs.head_weight is not None
    return target_logprobs(outputs.hidden, outputs.head_weight, batch.teacher_targets[batch.pair_teacher_index])


def measurement(config: DistillConfig, inputs: RunInputs, context: TrainContext) -> Callable[[], dict[str, float]]:
    """The measurement of ``--eval-every``: the student on held-out data (a collective)."""

    def measure() -> dict[str, float]:
        from megatron_tide.evaluate import scoring_inputs, validate

        held_out, batch = inputs.validation, config.train.micro_batch_size
        assert held_out is not None
        scoring, samples = scoring_inputs(held_out, "student"), config.save.eval_samples
        return validate(
            context.engine.module, held_out, scoring, world=context.world, samples=samples, batch_size=batch
        )

    return measure


def record_models(config: DistillConfig, inputs: RunInputs, world: DistContext) -> None:
    """Add the fingerprints of the student to start from and of the teacher to ``inputs.run`` (a collective).

    Raises:
        ValueError: ``--teacher`` is another one than the one of the cache.
    """
    paths, cache = {"student": config.paths.student, "teacher": config.paths.teacher}, inputs.cache
    with_weights = cache is None or any(Path(paths["teacher"] or os.devnull).glob("*.safetensors"))
    if not (inputs.strategy.needs_teacher and with_weights):
        paths["teacher"] = ""

    def read() -> dict[str, Any]:
        found = {
            side: ShardedFolder(resolve_folder(path)).fingerprint() if path else None for side, path in paths.items()
        }
        if cache is not None and found["teacher"] and not same_model(found["teacher"], cache.teacher):
            raise ValueError(
                f"{cache.folder}: the outputs of another teacher than {config.paths.teacher}; use that one, or run the "
                "cache command with another --out"
            )
        return found if cache is None else {**found, "teacher": cache.teacher}

    found = world.on_main(read)  # rank 0 reads for all ranks: the files are shared
    inputs.run.update({f"{side}_fingerprint": value for side, value in found.items()})


def starting_point(config: DistillConfig, inputs: RunInputs, context: TrainContext) -> TrainState:
    """The state to start from, as ``--resume`` says; a checkpoint of a different run is refused.

    Raises:
        ValueError: names the first flag or fingerprint that differs, or the folder that is in use.
    """
    world, folder, how = context.world, _resume_folder(config, context.world), "resuming"
    if folder is not None:
        refuse_other_run(folder, inputs.run)
    elif config.save.continue_from:
        folder, how = step_folder(Path(config.save.continue_from)), "continuing"
        refuse_other_run(folder, inputs.run, on_its_data=False)
        world.on_main(lambda: verify(folder))
    else:
        return TrainState(step=0, total_steps=inputs.total_steps)
    state = checkpoint.restore(folder, context.engine)
    world.print_rank0(f"{how} from {folder} at step {state.step}/{inputs.steps.stop}")
    return state


def _resume_folder(config: DistillConfig, world: DistContext) -> Path | None:
    out, resume = Path(config.paths.out), config.save.resume
    if resume == "never":
        if step_folders(out):
            raise ValueError(f"--resume never: {out} already contains checkpoints; use another --out or --resume auto")
        return None
    if resume != "auto":
        world.on_main(lambda: verify(Path(resume)))
        return Path(resume)
    # Rank 0 verifies for all ranks: the files are shared.
    found = world.on_main(lambda: newest_complete(out, world.print_rank0))
    if found is None and step_folders(out):
        raise ValueError(f"{out}: none of its checkpoints is complete; remove them to start over, or use another --out")
    return found


def refuse_other_folder(out: Path) -> None:
    """ValueError for a folder in which a run would replace files that no run wrote."""
    refuse_foreign(out, [METRICS], "run.json", "a run")
    refuse_other(out / "run.json", "config", "a run")


def refuse_other_run(folder: Path, run: dict[str, Any], on_its_data: bool = True) -> None:
    """Refuse a checkpoint whose run had other loss-affecting flags, bridge, models or schedule.

    ``on_its_data``: to resume that run: also one that had other data, or began elsewhere.
    """
    theirs = read_description(folder)["run"]
    if not isinstance(theirs.get("affects_loss"), dict):
        raise ValueError(f"{folder}: the run of another version, which cannot be resumed; use another --out")
    flags = DistillConfig().loss_flags() | theirs["affects_loss"]  # one that is newer than the run had its default
    for flag, mine in run["affects_loss"].items():
        if flags.get(flag) != mine:
            raise ValueError(
                f"{folder} was trained with {flag} = {flags.get(flag)!r}, this run has {mine!r}: "
                f"use that value or another --out, or remove the folder"
            )
    sums = run.get("sums")
    if (before := theirs.get("sums", sums)) != sums:  # earlier versions did not record them
        raise ValueError(
            f"{folder} was trained with {shown(before)} in its --deepspeed JSON, this run has {sums}: use those, or "
            "another --out"
        )
    names = ["bridge_fingerprint", "teacher_fingerprint", "student_fingerprint", "total_steps"]
    for what in ["data_fingerprint", *names] if on_its_data else names:
        if not same_model(theirs.get(what, run[what]), run[what]):  # earlier versions did not record the models
            raise ValueError(f"{folder} was trained with another {what.split('_')[0]}: use another --out")
    if on_its_data and theirs.get("continued") != run.get("continued"):
        raise ValueError(f"{folder}: that run began elsewhere (--continue-from): use another --out")
