"""Stage h: an optimizer step at full size, ours and the usual way: time of its parts, MFU, tokens a second, peak."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.gpu_stages import usual
from benchmarks.gpu_stages.bench import Bench
from benchmarks.gpu_stages.full import Item, Subject, random_teacher, training
from megatron_tide.models import masked_hidden_states
from megatron_tide.objectives import Strategy, denoise_loss
from megatron_tide.train.step import TrainContext, global_counts, to_device

GOAL = 0.40  # MFU
AGREE = 0.02  # of the loss, ours against the usual way, in bf16


def run(bench: Bench) -> None:
    with training(bench) as world:
        teacher = random_teacher(bench)
        bench.note(goal=GOAL, teacher_parameters=sum(p.numel() for p in teacher.parameters()))
        large, small = (2, 1) if bench.tiny else (8, 4)
        subject = Subject(bench, world, teacher, large)
        large_micro_batches(bench, subject, small)
        subject.close()
        other = Subject(bench, world, teacher, small)
        for name in ("tide-cross", "tide-bridge"):
            with_part(bench, f"{name}, micro-batch {small}", lambda name=name: measured(other, name))
        mixed = f"tide-cross, mixed lengths, micro-batch {small}"
        with_part(bench, mixed, lambda: measured(other, "tide-cross", True))


def large_micro_batches(bench: Bench, subject: Subject, small: int) -> None:
    """What is told first, if the time runs out: the goal, and the usual way beside it."""
    size = f"micro-batch {subject.micro_batch}"
    bench.note(student_parameters=sum(p.numel() for p in subject.engine.module.parameters()))
    ours = with_part(bench, f"tide-cross, {size}", lambda: measured(subject, "tide-cross"))
    bench.note(goal_met=ours.get("of_measured_peak", 0.0) >= GOAL)
    for loops in (True, False):
        way = f"the usual way, {'a loop over' if loops else 'our'} experts"
        usual_way = with_part(
            bench, f"{way}, micro-batch {small}", lambda loops=loops: the_usual_way(subject, loops, small)
        )
        if ours and usual_way:
            bench.note(**{f"speed over {way}": ours["tokens_a_second"] / usual_way["tokens_a_second"]})
    with_part(bench, f"tide-bridge, {size}", lambda: measured(subject, "tide-bridge"))


def with_part(bench: Bench, name: str, way: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``way()`` as a part of the stage, its figures under ``name``."""
    found: dict[str, Any] = {}
    with bench.part(name):
        found = way()
        bench.note(**{name: found})
    return found


def measured(subject: Subject, name: str, mixed: bool = False) -> dict[str, Any]:
    """Ours: whole steps, and then the parts of one."""
    strategy = subject.strategy(name, compdemo=False)
    context, microbatches = subject.context(strategy), subject.microbatches(strategy, mixed)
    found = timed_step(subject, microbatches, lambda: subject.step(context, microbatches))
    spent, flops = time_of_parts(subject, context, microbatches), subject.useful_flops(microbatches)
    sides = {"teacher": spent["teacher"], "student": sum(spent.values()) - spent["teacher"] - spent["copies"]}
    alone = {side: subject.bench.shares(flops[side], taken) for side, taken in sides.items()}
    return {
        **found,
        "milliseconds_a_micro_batch": found["step_ms"] / len(microbatches),
        "milliseconds_of_parts": spent,
        "each_alone": alone,
        "planned_peak_bytes": subject.planned_bytes(strategy),
    }


def timed_step(subject: Subject, microbatches: list[Item], step: Callable[[], Any], rounds: int = 3) -> dict[str, Any]:
    """Of a step: seconds, after a first one that compiles; FLOP/s and their shares, tokens a second, peak memory."""
    bench = subject.bench
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    first = bench.seconds(step)
    (taken,) = bench.milliseconds([step], rounds, warmup=0)
    flops, tokens = sum(subject.useful_flops(microbatches).values()), sum(item.inputs.tokens for item in microbatches)
    found = {"step_ms": taken, "first_step_s": first, "micro_batches": len(microbatches), "useful_tflop": flops / 1e12}
    found |= {"tokens_a_second": tokens / taken * 1e3, **bench.shares(flops, taken)}
    if bench.cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found


def the_usual_way(subject: Subject, loops: bool, micro_batch: int) -> dict[str, Any]:
    """In micro-batches that its logits leave room for, half of our samples a step; losses must agree with ours."""
    strategy = subject.strategy("tide-cross")
    whole = subject.micro_batch
    subject.micro_batch = micro_batch
    # As many micro-batches as the engine adds up.
    microbatches = subject.microbatches(strategy)[: subject.batch // whole]
    subject.micro_batch = whole
    context = subject.context(strategy)
    mine, theirs = subject.step(context, microbatches)["loss/total"], []

    def step() -> None:
        theirs.append(usual.step(subject, strategy, microbatches)["loss/total"])

    with usual.looped_experts() if loops else nullcontext():
        found = timed_step(subject, microbatches, step, rounds=1)
    if not abs(theirs[0] / mine - 1) < AGREE:  # a step of a small learning rate lies between them
        raise AssertionError(f"the usual way's loss is {theirs[0]}, ours {mine}")
    return {**found, "loss": theirs[0], "our_loss": mine}


Take = Callable[[str, Callable[[], Any]], Any]


def parts(subject: Subject, context: TrainContext, microbatches: list[Item], take: Take) -> None:
    """One step as calls ``take(name of the part, what it does)``, which returns what the part returns."""
    engine, strategy = context.engine, context.strategy
    inputs = take("copies", lambda: to_device([item.inputs for item in microbatches], subject.world.device))
    counts, _ = global_counts(inputs, subject.world, False)
    answers = take("teacher", lambda: context.backend.score(inputs))
    for number, (batch, outputs) in enumerate(zip(inputs, answers), 1):
        hidden = take("student_forward", lambda: masked_hidden_states(engine.module, batch.student))  # noqa: B023
        loss = take("head_and_loss", lambda: _loss(strategy, engine, batch, outputs, hidden, counts))  # noqa: B023
        take("backward", lambda: engine.backward(loss, scale_wrt_gas=False))  # noqa: B023
        take("optimizer" if number == len(microbatches) else "engine", engine.step)


def time_of_parts(subject: Subject, context: TrainContext, microbatches: list[Item]) -> dict[str, float]:
    """Milliseconds of the parts of one step, each alone, so that they do not overlap."""
    spent: dict[str, float] = {}

    def take(name: str, way: Callable[[], Any]) -> Any:
        result: list[Any] = []
        spent[name] = spent.get(name, 0.0) + 1e3 * subject.bench.seconds(lambda: result.append(way()))
        return result[0]

    parts(subject, context, microbatches, take)
    return spent


def _loss(strategy: Strategy, engine: Any, batch: Any, outputs: Any, hidden: Any, counts: Any) -> Any:
    strength = strategy.strength(0.5, batch.rate)
    scores = strategy.score(hidden, engine.module.head_weight, batch, outputs, strength)
    denoise = denoise_loss(scores.target_logprobs, batch.inverse_weight[batch.student_level], counts.maskable)
    distill, _ = strategy.loss(scores, outputs, batch, strength, counts)
    return denoise + strategy.distill_weight * distill
