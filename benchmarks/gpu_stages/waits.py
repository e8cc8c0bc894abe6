"""Stage g: where a step waits for the device, by torch's sync debug mode: first counted, then as an error.

The optimizer step reads the gradient's norm, so it may wait; nothing before it may.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu_stages.bench import Bench
from benchmarks.gpu_stages.full import Subject, random_teacher, training
from benchmarks.gpu_stages.full_size import parts

LAYERS = 2  # of both models: one of the teacher's is dense, one has experts
MAY_WAIT = {"optimizer"}
WAITED = "called a synchronizing CUDA operation"  # torch's words


def run(bench: Bench) -> None:
    with training(bench) as world:
        subject = Subject(bench, world, random_teacher(bench, LAYERS), 2, LAYERS)
        for name in ("tide-cross", "tide-bridge"):
            with bench.part(name):
                bench.note(**{name: waits_of(subject, name)})


def waits_of(subject: Subject, name: str) -> dict[str, Any]:
    """Of a step: waits of each part and where they are; and whether the parts run with waiting forbidden."""
    strategy = subject.strategy(name)
    context, microbatches = subject.context(strategy), subject.microbatches(strategy)
    subject.step(context, microbatches)
    counted: dict[str, Counter[str]] = {}

    def count(part: str, way: Callable[[], Any]) -> Any:
        with watched(subject.bench, places := []):
            result = way()
        counted.setdefault(part, Counter()).update(places)
        return result

    def forbid(part: str, way: Callable[[], Any]) -> Any:
        with forbidden(subject.bench.cuda and part not in MAY_WAIT):
            return way()

    parts(subject, context, microbatches, count)
    free = not any(places for part, places in counted.items() if part not in MAY_WAIT)
    found = {part: {"waits": places.total(), "where": dict(places.most_common(8))} for part, places in counted.items()}
    subject.bench.note(**{f"{name}, waits": found})
    parts(subject, context, microbatches, forbid)
    return {"micro_batches": len(microbatches), "only_the_optimizer_waits": free, "runs_with_waiting_forbidden": True}


@contextmanager
def watched(bench: Bench, places: list[str]) -> Iterator[None]:
    """Add to ``places`` the line of each call that waits for the device."""
    if not bench.cuda:
        yield
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places += [f"{w.filename}:{w.lineno}" for w in caught if WAITED in str(w.message)]


@contextmanager
def forbidden(here: bool) -> Iterator[None]:
    """Within, a call that waits for the device raises."""
    if not here:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
