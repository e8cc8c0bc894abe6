"""The inference benchmark of a run folder, as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tide.evaluate.inference_benchmark import Measured, read_inference_benchmark


class Table(NamedTuple):
    """Text for people. The last cell of a row that is shorter than the head is a remark."""

    head: Sequence[str]
    rows: list[list[str]]


def inference(path: Path) -> dict[str, Any]:
    """conditions, table and memory: text about the two models of the inference benchmark."""
    found = read_inference_benchmark(path)
    sides = {"student": found.student, "teacher": found.teacher}
    settings, machine = found.settings, found.machine
    gpu = machine["accelerators"] and settings["device"] != "cpu"
    ratios = {"parameters": found.teacher.parameters / found.student.parameters, **found.ratios()}
    rows = [_inference_row(side, measured) for side, measured in sides.items()]
    rows.append(["teacher / student", *(f"{value:.1f} times" for value in ratios.values()), *[""] * (len(ratios) // 2)])
    working = {side: measured for side, measured in sides.items() if not measured.cannot}
    peaks = " and ".join(f"{size(measured.process_bytes)} ({side})" for side, measured in working.items())
    memory_of = next((measured.memory_of for measured in working.values()), "")
    return {
        "conditions": f"{settings['new_tokens']} new tokens after one prompt, batch 1, one token per pass, "
        f"{settings['dtype']} on {settings['device']} ({machine['accelerators'][0] if gpu else machine['cpu']}, "
        f"{machine['cores']} cores), median of {settings['repeats']} answers, each model in a fresh process, "
        f"{found.date}. No answer ends before its last token.",
        "table": Table(
            ("model", "parameters", "weights", "memory while answering", "seconds", "tokens/s", "passes"), rows
        ),
        "memory": f"Memory: {memory_of}. Peak of the whole process, libraries included: {peaks}."
        if working
        else "Neither model answers here.",
    }


def _inference_row(side: str, measured: Measured) -> list[str]:
    row = [f"{side}, {measured.model_type}", f"{measured.parameters:,}", size(measured.weights_bytes)]
    if measured.cannot:
        return [*row, f"not measured: {measured.cannot}"]
    speed = [f"{measured.median_seconds:.2f}", f"{measured.tokens_per_s:.1f}", str(measured.passes)]
    return [*row, size(measured.memory_bytes), *speed]


def size(count: float) -> str:
    """Bytes as text, in powers of a thousand as in the published table."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
