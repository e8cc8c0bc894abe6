"""Stage i: an optimizer step at full size with each optimisation switched off alone.

Those of ``megatron_tide.fast`` by its variable, the compiled layers by their flag; of two that have no switch, because
no one would go without them, the code is replaced for the time of the measurement. The engine is made anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

from benchmarks.gpu_stages import usual
from benchmarks.gpu_stages.bench import Bench
from benchmarks.gpu_stages.full import Subject, random_teacher, training
from benchmarks.gpu_stages.full_size import timed_step
from megatron_tide import fast
from megatron_tide.diffusion.attention import BlockDiffusionMask
from megatron_tide.train.distributed import DistContext


@contextmanager
def off(name: str) -> Iterator[None]:
    """One of ``fast.SWITCHES`` switched off."""
    with patch.dict(os.environ, {fast.VARIABLE: name}):
        yield


# Name -> what to be within, flags of the run.
SWITCHES: dict[str, tuple[Callable[[], AbstractContextManager[Any]], dict[str, Any]]] = {
    "compiled layers": (nullcontext, {"compile_layers": False}),
    **{f"{name}: {what}": (lambda name=name: off(name), {}) for name, what in fast.SWITCHES.items()},
    "flex attention (a dense mask instead)": (
        lambda: patch.object(BlockDiffusionMask, "flex", BlockDiffusionMask.dense),
        {},
    ),
    "grouped experts (a loop instead)": (usual.looped_experts, {}),
}


def run(bench: Bench) -> None:
    with training(bench) as world:
        teacher = random_teacher(bench)
        with bench.part("all on"):
            bench.note(**{"all on": measured(bench, world, teacher, {})})
        for name, (within, flags) in list(SWITCHES.items())[:: 4 if bench.tiny else 1]:
            if bench.left < 12:
                bench.note(left_out=[*bench.figures.get("left_out", []), name])
                continue
            with bench.part(name), within():
                found = measured(bench, world, teacher, flags)
                before = bench.figures.get("all on", {}).get("step_ms", float("nan"))
                saves = (found["step_ms"] - before) / found["micro_batches"]
                bench.note(**{name: {**found, "saves_ms_a_micro_batch": saves}})


def measured(bench: Bench, world: DistContext, teacher: Any, flags: dict[str, Any]) -> dict[str, Any]:
    subject = Subject(bench, world, teacher, 2 if bench.tiny else 8, **flags)
    strategy = subject.strategy("tide-cross")
    context, microbatches = subject.context(strategy), subject.microbatches(strategy)
    try:
        return timed_step(subject, microbatches, lambda: subject.step(context, microbatches), rounds=2)
    finally:
        subject.close()
