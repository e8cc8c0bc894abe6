"""Held-out likelihood of several models as one table: the same masks for every row, paired to the first student."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.data import PreparedData
from megatron_tide.data.progress import Progress
from megatron_tide.evaluate.answerers import OpenModel
from megatron_tide.evaluate.likelihood import LikelihoodReport, evaluate_likelihood
from megatron_tide.evaluate.sides import Side, student_side, teacher_side


@dataclass(frozen=True)
class Row:
    """One model's line."""

    name: str
    path: str
    report: LikelihoodReport
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured on, and how, for every model alike."""

    data: PreparedData
    context: str
    samples: int
    draws: int
    seed: int
    batch_size: int
    dtype: torch.dtype
    device: str

    def sides(self) -> dict[str, Side]:
        """Side of each tokenizer by fingerprint; the student's where both sides have the same."""
        sides = {} if self.data.student_only else {self.fingerprint("teacher"): teacher_side(self.data, self.context)}
        return sides | {self.fingerprint("student"): student_side(self.data)}

    def fingerprint(self, side: str) -> str:
        return str(self.data.manifest[side]["fingerprint"])


def measure_model(name: str, path: str, side: Side | None, how: Measuring, open_model: OpenModel) -> Row:
    """One row; ``side`` None: the one whose tokenizer the model has.

    Raises:
        ValueError: a model whose tokenizer the data was not prepared with.
    """
    opened = open_model(path, how.dtype, how.device)
    mine = load_tokenizer(opened.folder).fingerprint
    if side is None:
        side = how.sides().get(mine)
        if side is None:
            raise ValueError(f"{path}: {how.data.folder} was prepared for models with other tokenizers")
    if mine != how.fingerprint(side.name):
        raise ValueError(f"{path}: {how.data.folder} was prepared for a {side.name} with another tokenizer")
    started = time.perf_counter()
    bar: Any = None

    def progress(done: int, total: int) -> None:
        nonlocal bar
        bar = bar or Progress(total, name)
        bar.update(done)

    report = evaluate_likelihood(
        opened.model,
        how.data,
        side,
        samples=how.samples,
        draws=how.draws,
        seed=how.seed,
        batch_size=how.batch_size,
        progress=progress,
    )
    bar.close()
    return Row(name, path, report, time.perf_counter() - started)


def first_student(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.report.side == "student"), None)


def likelihood_table(rows: list[Row]) -> str:
    """For people: one line a model."""
    base, width = first_student(rows), max(5, *(len(row.name) for row in rows))
    head = (
        f"{'model':<{width}}  {'side':<7}  {'bits per byte':<25}  {'less the first student':<27}  masked-token accuracy"
    )
    lines = [head, "-" * len(head)]
    for row in rows:
        difference = "" if base is None or row is base else f"{row.report.minus(base.report):+}"
        lines.append(
            f"{row.name:<{width}}  {row.report.side:<7}  {row.report.bits_per_byte!s:<25}  {difference:<27}  "
            f"{row.report.accuracy}"
        )
    return "\n".join(lines)


def likelihood_record(rows: list[Row], how: Measuring) -> dict[str, Any]:
    """For programs: settings, and every model with its numbers."""
    base = first_student(rows)
    return {
        "data": {"folder": str(how.data.folder), "fingerprint": how.data.fingerprint},
        "settings": {
            "samples": rows[0].report.samples,
            "draws": how.draws,
            "seed": how.seed,
            "teacher_context": how.context,
            "dtype": str(how.dtype).removeprefix("torch."),
        },
        "models": [
            {
                "name": row.name,
                "path": row.path,
                **row.report.to_dict(),
                "minus_first_student": row.report.minus(base.report).to_dict() if base else None,
                "seconds": row.seconds,
            }
            for row in rows
        ],
    }
