"""Stage i: an optimizer step at full size with each optimisation switched off alone.

A switch replaces attributes of the package for the time of a measurement; an engine is built anew under each. What a
version of the package does not have is said, and left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.gpu_stages import usual
from benchmarks.gpu_stages.bench import Bench
from benchmarks.gpu_stages.full import Subject, random_teacher, training
from benchmarks.gpu_stages.full_size import timed_step

# Name -> attributes to replace, each by a function of what it is: "module:path in the module".
Patch = dict[str, Callable[[Any], Any]]
SWITCHES: dict[str, Patch] = {
    "flex attention (a dense mask instead)": {
        "megatron_tide.diffusion.attention:BlockDiffusionMask.flex": lambda old: _dense,
    },
    "grouped experts (a loop instead)": {
        "megatron_tide.models.experts:Experts.forward": lambda old: usual.loop_forward
    },
    "page-locked inputs": {"megatron_tide.diffusion.inputs:DistillBatch.pin_memory": lambda old: lambda self: self},
}


def _dense(mask: Any) -> Any:
    return mask.dense()


def run(bench: Bench) -> None:
    with training(bench) as world:
        teacher = random_teacher(bench)
        with bench.part("all on"):
            bench.note(**{"all on": measured(bench, world, teacher)})
        for name, patch in SWITCHES.items():
            if bench.left < 12:
                bench.note(left_out=[*bench.figures.get("left_out", []), name])
                continue
            with bench.part(name):
                missing = [path for path in patch if not exists(path)]
                if missing:
                    bench.note(**{name: {"not_in_this_version": missing}})
                    continue
                with replaced(patch):
                    found = measured(bench, world, teacher)
                before = bench.figures.get("all on", {}).get("step_ms", float("nan"))
                bench.note(
                    **{name: {**found, "saves_ms_a_micro_batch": (found["step_ms"] - before) / found["micro_batches"]}}
                )


def measured(bench: Bench, world: Any, teacher: Any) -> dict[str, Any]:
    subject = Subject(bench, world, teacher, 2 if bench.tiny else 8)
    strategy = subject.strategy("tide-cross")
    context, window = subject.context(strategy), subject.window(strategy)
    return timed_step(subject, window, lambda: subject.step(context, window))


def _holder(path: str) -> tuple[Any, str]:
    module, _, inner = path.partition(":")
    *holders, name = inner.split(".")
    found: Any = importlib.import_module(module)
    for holder in holders:
        found = getattr(found, holder)
    return found, name


def exists(path: str) -> bool:
    try:
        return hasattr(*_holder(path))
    except (ImportError, AttributeError):
        return False


@contextmanager
def replaced(patch: Patch) -> Iterator[None]:
    """The attributes of ``patch`` replaced within, and as they were after."""
    before = [(*_holder(path), getattr(*_holder(path)), new) for path, new in patch.items()]
    try:
        for holder, name, old, new in before:
            setattr(holder, name, new(old))
        yield
    finally:
        for holder, name, old, _ in before:
            setattr(holder, name, old)
