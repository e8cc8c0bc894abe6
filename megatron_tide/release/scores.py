"""Measured scores in a release's model card: one section, replaced as often as the model is measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def write_scores(folder: str | Path, scores: Sequence[Score]) -> None:
    """Put ``scores`` into the model card of the release ``folder``, in place of those of the same tasks and metrics.

    Raises:
        ValueError: ``folder`` is not a release.
    """
    card = Path(folder) / "README.md"
    if not card.is_file() or PLACE not in card.read_text(encoding="utf-8"):
        raise ValueError(f"{folder}: has no model card to write scores into; tools/convert_to_hf.py makes one")
    text = card.read_text(encoding="utf-8")
    lines = _kept(text, {(score.task, score.metric) for score in scores})
    lines += [
        f"| {s.task} | {s.metric} | {s.value:.4g} | {s.low:.4g} to {s.high:.4g} | {s.count} | {_cell(s.how)} |"
        for s in scores
    ]
    head = ["| task | metric | score | 95 % interval | samples | settings |", "|---|---|---|---|---|---|"]
    section = "\n".join([HEADING, "", *head, *lines]) + "\n\n"
    text = _SECTION.sub("", text).replace(PLACE, section + PLACE, 1)
    draft = card.with_name(".README.md.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(card)


def _kept(text: str, replaced: set[tuple[str, str]]) -> list[str]:
    """The rows of the card's table that are not measured anew."""
    section = _SECTION.search(text)
    rows = [line for line in section[0].splitlines() if line.startswith("| ")][1:] if section else []
    return [row for row in rows if tuple(row.strip("| ").split(" | ")[:2]) not in replaced]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
