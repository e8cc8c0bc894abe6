"""Held-out likelihood of several models as one table: the same masks for every row, paired with the first student."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.data import PreparedData
from megatron_tide.evaluate.bootstrap import Estimate
from megatron_tide.evaluate.likelihood import LikelihoodReport, evaluate_likelihood, scoring_inputs
from megatron_tide.training_checkpoint import generation_of, open_model


def check_has_bound(path: str | Path) -> None:
    """Raises: ValueError for an autoregressive model: its likelihood is no diffusion bound."""
    if generation_of(path) == "autoregressive":
        raise ValueError(
            f"{path}: an autoregressive model has no diffusion bound; leave out likelihood, or name it with --student "
            "if its weights are a diffusion model's"
        )


@dataclass(frozen=True)
class Row:
    """One model's line."""

    name: str
    path: str
    report: LikelihoodReport
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings:
    """What every model is measured on, and how. ``teacher_context``: the attention layout of teachers."""

    data: PreparedData
    teacher_context: str
    samples: int
    mc_samples: int
    seed: int
    batch_size: int
    dtype: torch.dtype
    device: str


def measure_model(name: str, path: str, role: str | None, how: LikelihoodSettings) -> Row:
    """One row, scored as ``role`` (student or teacher); None: the one with the tokenizer of the model.

    Raises:
        ValueError: the data was prepared for other tokenizers than the model's.
    """
    opened = open_model(path, how.dtype, how.device)
    mine = load_tokenizer(opened.folder).fingerprint
    roles = ("student",) if how.data.student_only else ("student", "teacher")
    fitting = [one for one in roles if how.data.manifest[one]["fingerprint"] == mine]
    if not (role or fitting):
        raise ValueError(f"{path}: {how.data.folder} was prepared for models with other tokenizers")
    role = role or fitting[0]
    scoring = scoring_inputs(how.data, role, how.teacher_context if role == "teacher" else "staircase")
    if role not in fitting:
        raise ValueError(f"{path}: {how.data.folder} was prepared for a {role} with another tokenizer")
    started = time.perf_counter()
    report = evaluate_likelihood(
        opened.model,
        how.data,
        scoring,
        samples=how.samples,
        mc_samples=how.mc_samples,
        seed=how.seed,
        batch_size=how.batch_size,
        label=name,
    )
    return Row(name, path, report, time.perf_counter() - started)


def first_student(rows: list[Row]) -> Row | None:
    return next((row for row in rows if row.report.side == "student"), None)


LIKELIHOOD_HEAD = ("model", "side", "bits per byte", "minus the first student", "masked-token accuracy")


def likelihood_cells(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The "models" of a likelihood record as text, one row of ``LIKELIHOOD_HEAD`` per model, with 95 % intervals."""
    rows = []
    for model in models:
        bits, accuracy = (str(Estimate(**model[name])) for name in ("bits_per_byte", "masked_token_accuracy"))
        difference = model["minus_first_student"]
        rows.append([model["name"], model["side"], bits, f"{Estimate(**difference):+}" if difference else "", accuracy])
    return rows


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: columns to the left, a rule below the head."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def likelihood_record(rows: list[Row], how: LikelihoodSettings) -> dict[str, Any]:
    """For programs: settings, and every model with its numbers."""
    base = first_student(rows)
    return {
        "data": {"folder": str(how.data.folder), "fingerprint": how.data.fingerprint},
        "settings": {
            "samples": rows[0].report.samples,
            "mc_samples": how.mc_samples,
            "seed": how.seed,
            "teacher_context": how.teacher_context,
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
