"""Measured scores in a release's model card: one section, replaced as often as the model is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tide.files import atomic_write

HEADING = "## Scores"
PLACE = "## Parity"  # the section that the scores stand before
_SECTION = re.compile(rf"^{HEADING}\n.*?(?=^## |\Z)", flags=re.M | re.S)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measured number with its 95 % interval, over ``count`` samples; ``how``: the settings that decide it."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    count: int
    how: str


def has_card(folder: str | Path) -> bool:
    """Whether ``folder`` is a release with a model card."""
    card = Path(folder) / "README.md"
    return card.is_file() and PLACE in card.read_text(encoding="utf-8")


def write_scores(folder: str | Path, scores: Sequence[Score]) -> None:
    """Put ``scores`` into the model card of the release ``folder``, in place of those of the same tasks and metrics.

    Raises:
        ValueError: ``folder`` is not a release.
    """
    card = Path(folder) / "README.md"
    if not has_card(folder):
        raise ValueError(f"{folder}: has no model card to write scores into; the convert command makes one")
    text = card.read_text(encoding="utf-8")
    lines = _kept(text, {(score.task, score.metric) for score in scores})
    lines += [
        f"| {s.task} | {s.metric} | {s.value:.4g} | {s.low:.4g} to {s.high:.4g} | {s.count} | {_cell(s.how)} |"
        for s in scores
    ]
    head = ["| task | metric | score | 95 % interval | samples | settings |", "|---|---|---|---|---|---|"]
    section = "\n".join([HEADING, "", *head, *lines]) + "\n\n"
    text = _SECTION.sub("", text).replace(PLACE, section + PLACE, 1)
    atomic_write(card, text.encode())


def card_scores(content: Mapping[str, Any], path: str) -> list[Score]:
    """What the record of tools/evaluate.py (its ``--json``) holds about the model at ``path``."""
    scores = []
    settings = content.get("settings", {})
    for model in content.get("models", ()):
        if model["path"] != path:
            continue
        how = f"diffusion bound, {settings['mc_samples']} timesteps per sample"
        how += f", seed {settings['seed']}, {settings['dtype']}"
        task = f"held-out text ({Path(content['data']['folder']).name})"
        for metric in ("bits_per_byte", "masked_token_accuracy"):
            estimate = model[metric]
            scores.append(
                Score(task=task, metric=metric.replace("_", " "), count=model["samples"], how=how, **estimate)
            )
    for benchmark in content.get("benchmarks", ()):
        if benchmark["path"] != path:
            continue
        preset = benchmark["preset"]
        shots = "the task's own" if preset["few_shot"] is None else preset["few_shot"]
        how = f"{preset['task']}, {shots} shots, {preset['new_tokens']} tokens in {preset['steps']} passes"
        how += f", temperature {preset['temperature']:g}"
        for score in benchmark["scores"]:
            metric = score["metric"] if score["filter"] == "none" else f"{score['metric']} {score['filter']}"
            estimate = {name: 100 * score[name] for name in ("value", "low", "high")}
            scores.append(
                Score(task=benchmark["benchmark"], metric=f"{metric}, %", count=score["n"], how=how, **estimate)
            )
    return scores


def _kept(text: str, replaced: set[tuple[str, str]]) -> list[str]:
    """The rows of the card's table that are not measured anew."""
    section = _SECTION.search(text)
    rows = [line for line in section[0].splitlines() if line.startswith("| ")][1:] if section else []
    return [row for row in rows if tuple(row.strip("| ").split(" | ")[:2]) not in replaced]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
