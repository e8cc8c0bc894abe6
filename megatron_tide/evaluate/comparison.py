"""Held-out scores of several models as one table: the same masks for every row, differences paired to chosen rows."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_tide.bridge import load_tokenizer
from megatron_tide.choices import ATTENTION_LAYOUTS, BLOCK_LAYOUTS, LIKELIHOOD_NOISE
from megatron_tide.cli import say
from megatron_tide.data import PreparedData
from megatron_tide.evaluate.completions import Completions, completions
from megatron_tide.evaluate.likelihood import LikelihoodReport, evaluate_likelihood, scoring_inputs
from megatron_tide.hub import stated_block_size
from megatron_tide.models import read_config, resolve_folder
from megatron_tide.training_checkpoint import folder_and_block, generation_of, open_model


def check_has_bound(path: str | Path, role: str | None) -> None:
    """Raises: ValueError for an autoregressive model without a role, whose likelihood is no diffusion bound, or of no
    family of ours.
    """
    if generation_of(path) != "autoregressive":
        return
    read_config(resolve_folder(path))
    if role is None:
        raise ValueError(
            f"{path}: an autoregressive model has no diffusion bound; name it with --teacher and add --teacher-context "
            "causal for its own likelihood, or with --student if its weights are a diffusion model's"
        )


@dataclass(frozen=True)
class Row:
    """One model's line."""

    name: str
    path: str
    report: LikelihoodReport
    completions: Completions | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LikelihoodSettings:
    """What every model is measured on, and how.

    ``teacher_context``: the attention layout of teachers. ``noise``: a name of ``LIKELIHOOD_NOISE``. ``baselines``:
    names of the rows that each row is compared with; none: the first student. ``completions``: the number of prompts to
    answer, by the ``decoding`` rule (fields of ``DecodingRule``); ``copies``: further
    devices, whose copies of a model share the batches. ``block_layout``: a name of ``BLOCK_LAYOUTS``, for
    both. ``per_sample``: the record has each sample's numbers.
    """

    data: PreparedData
    teacher_context: str
    samples: int
    mc_samples: int
    noise: str
    seed: int
    batch_size: int
    dtype: torch.dtype
    device: str
    copies: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    completions: int = 0
    decoding: Mapping[str, Any] = field(default_factory=dict)
    block_layout: str = "sequence"
    per_sample: bool = False

    def __post_init__(self) -> None:
        LIKELIHOOD_NOISE[self.noise].check(ATTENTION_LAYOUTS[self.teacher_context])


def measure_model(name: str, path: str, role: str | None, how: LikelihoodSettings) -> Row:
    """One row, scored as ``role`` (student or teacher); None: the one with the tokenizer of the model.

    Raises:
        ValueError: the data was prepared for other tokenizers than the model's.
    """
    opened = open_model(path, how.dtype, how.device)
    tokenizer = load_tokenizer(opened.folder)
    roles = ("student",) if how.data.student_only else ("student", "teacher")
    fitting = [one for one in roles if how.data.manifest[one]["fingerprint"] == tokenizer.fingerprint]
    if not (role or fitting):
        raise ValueError(f"{path}: {how.data.folder} was prepared for models with other tokenizers")
    role = role or fitting[0]
    context, at_answer = how.teacher_context if role == "teacher" else "staircase", BLOCK_LAYOUTS[how.block_layout]
    scoring = scoring_inputs(how.data, role, context, at_answer=at_answer)
    if role not in fitting:
        raise ValueError(f"{path}: {how.data.folder} was prepared for a {role} with another tokenizer")
    how.data.check_model(role, path, opened.model.config)
    _tell_differences(name, path, role, how.data)
    started = time.perf_counter()
    copies = [open_model(path, how.dtype, device).model for device in how.copies]
    report = evaluate_likelihood(
        opened.model,
        how.data,
        scoring,
        samples=how.samples,
        mc_samples=how.mc_samples,
        noise=LIKELIHOOD_NOISE[how.noise],
        seed=how.seed,
        batch_size=how.batch_size,
        label=name,
        copies=copies,
    )
    answers = None
    if how.completions:
        how_many: dict[str, Any] = {
            "count": how.completions,
            "batch_size": how.batch_size,
            "copies": copies,
            "block_layout": how.block_layout,
        }
        answers = completions(opened.model, tokenizer, how.data, role, label=name, **how_many, **how.decoding)
    return Row(name, path, report, answers, time.perf_counter() - started)


def _tell_differences(name: str, path: str, role: str, data: PreparedData) -> None:
    """Tell of what makes the numbers those of another text, or of other blocks, than the model's own."""
    if changed := data.changed(role):
        many = f"{changed:,} of {len(data):,} responses in {data.folder}"
        say(f"note: {name}'s tokenizer changes the text of {many}: its bits are of another text", file=sys.stderr)
    (folder, trained), block = folder_and_block(path), data.manifest[role]["block"]
    own = trained or stated_block_size(str(folder))
    if own not in (None, block):
        say(
            f"note: {name} is scored in blocks of {block} tokens, as {data.folder} has; its own are {own}",
            file=sys.stderr,
        )


def baselines_of(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows called ``names``, in that order; without names, the first student if there is one."""
    if names:
        by_name = {row.name: row for row in rows}
        return [by_name[name] for name in dict.fromkeys(names)]
    return [row for row in rows if row.report.side == "student"][:1]


def likelihood_record(rows: list[Row], how: LikelihoodSettings, data: str) -> dict[str, Any]:
    """For programs: settings, and every model with its numbers; ``data``: what was asked for."""
    bases = baselines_of(rows, how.baselines)
    content: dict[str, Any] = {
        "data": {"folder": data, "fingerprint": how.data.fingerprint},
        "settings": {
            "samples": rows[0].report.samples,
            "mc_samples": how.mc_samples,
            "likelihood_noise": how.noise,
            "seed": how.seed,
            "teacher_context": how.teacher_context,
            "block_layout": how.block_layout,
            "dtype": str(how.dtype).removeprefix("torch."),
            "baselines": [base.name for base in bases],
        },
        "models": [
            {
                "name": row.name,
                "path": row.path,
                **row.report.to_dict(),
                "minus": {base.name: row.report.minus(base.report).to_dict() for base in bases},
                **({"per_sample": row.report.per_sample()} if how.per_sample else {}),
                **({"completions": row.completions.to_dict(how.seed)} if row.completions else {}),
                "seconds": row.seconds,
            }
            for row in rows
        ],
    }
    if asked := rows[0].completions:
        content["completions"] = {"prompts": asked.prompts, "references": asked.references}
        content["settings"]["decoding"] = dict(how.decoding)
    return content
