"""The section on memory and speed: what ``footprint`` measured, beside what is published."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_tide.report.footprint import PUBLISHED, PUBLISHED_ON, Footprint
from megatron_tide.report.measure import Measured
from megatron_tide.report.page import note, table, words
from megatron_tide.report.reading import Run

HEAD = ("model", "parameters", "weights", "memory while answering", "seconds", "tokens/s", "passes")


def footprint_parts(runs: Sequence[Run]) -> Iterator[str]:
    """HTML parts: a table a run, and the published one."""
    for run in runs:
        if run.footprint is not None:
            yield words(f"{run.label}: {_settings(run.footprint)}")
            yield table(HEAD, _rows(run.footprint))
            yield words(_memory(run.footprint))
        elif len(runs) == 1:
            yield note(run.notes["footprint"])
        else:
            yield note(f"{run.label}: {run.notes['footprint']}")
    small, large, plain = PUBLISHED
    yield words(f"Published (arXiv 2604.26951), {PUBLISHED_ON}: another size of model, another machine.")
    rows = [[one.name, f"{one.memory_gb:g} GB", f"{one.seconds:.2f}"] for one in (small, large, plain)]
    ratios = f"{large.memory_gb / small.memory_gb:.1f} times", f"{large.seconds / small.seconds:.1f} times"
    yield table(("model", "memory", "seconds"), [*rows, ["teacher / student", *ratios]])


def _rows(footprint: Footprint) -> Iterator[list[str]]:
    yield _row("student", footprint.student)
    yield _row("teacher", footprint.teacher)
    ratios = {name: f"{value:.1f} times" for name, value in footprint.ratios().items()}
    counts = f"{footprint.teacher.parameters / footprint.student.parameters:.1f} times"
    answered = [ratios[name] for name in ("memory", "seconds") if name in ratios]
    yield ["teacher / student", counts, ratios["weights"], *([*answered, "", ""] if answered else [""])]


def _row(side: str, measured: Measured) -> list[str]:
    plain = [f"{side}, {measured.model_type}", f"{measured.parameters:,}", size(measured.weights_bytes)]
    if measured.cannot:
        return [*plain, f"not measured: {measured.cannot}"]
    seconds = f"{measured.median_seconds:.2f}"
    return [*plain, size(measured.memory_bytes), seconds, f"{measured.tokens_per_s:.1f}", str(measured.passes)]


def _settings(footprint: Footprint) -> str:
    chosen, machine = footprint.settings, footprint.machine
    where = machine["accelerators"][0] if machine["accelerators"] and chosen["device"] != "cpu" else machine["cpu"]
    return (
        f"{chosen['new_tokens']} new tokens after one prompt, batch 1, one token a pass, {chosen['dtype']} on "
        f"{chosen['device']} ({where}, {machine['cores']} cores), median of {chosen['repeats']} answers, each model in "
        f"a fresh process, {footprint.date}. No answer ends before its last token."
    )


def _memory(footprint: Footprint) -> str:
    of = footprint.student.memory_of or footprint.teacher.memory_of
    peaks = [
        f"{size(measured.process_bytes)} ({side})"
        for side, measured in (("student", footprint.student), ("teacher", footprint.teacher))
        if not measured.cannot
    ]
    if not peaks:
        return "Neither model answers here."
    return f"Memory: {of}. Whole processes, libraries included, peaked at {' and '.join(peaks)}."


def size(count: float) -> str:
    """Bytes for people, in powers of a thousand as the published table has them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
