"""The table of scores for people: one printing for the terminal, the report page and the recipes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_tide.evaluate.bootstrap import Estimate
from megatron_tide.files import read_json

_ESTIMATE = {"value": float, "low": float, "high": float}
_COMPLETIONS = {"both": int, "parse": int, "count": int, "mean_characters": float}
_MODEL = {"name": str, "side": str, "path": str, "bits_per_byte": _ESTIMATE, "masked_token_accuracy": _ESTIMATE}
_MODEL |= {"minus?": {str: _ESTIMATE}, "completions?": (None, _COMPLETIONS)}
_SAMPLES = {"per_sample?": {"bytes": [float], "nats": [float]}}
_SCORES = {"models": [{**_MODEL, **_SAMPLES}], "data": {"fingerprint": str}, "settings": {"samples": int}}


def read_scores(path: Path, more: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What the evaluate command wrote about likelihoods with ``--json``; ``more``: further parts of its form.

    Raises:
        ValueError: one line: it is something else, or corrupt.
    """
    scores = read_json(path, "evaluate writes it: run the recipe again", {**_SCORES, **more})
    if not scores["models"]:
        raise ValueError(f"{path}: holds no model's scores; run the recipe again")
    return scores


def score_cells(model: Mapping[str, Any]) -> dict[str, str]:
    """One of the "models" of a record as text: column -> cell, with 95 % intervals."""
    cells = {"model": model["name"], "side": model["side"], "bits per byte": str(Estimate(**model["bits_per_byte"]))}
    for name, difference in model.get("minus", {}).items():
        cells[f"minus {name}"] = f"{Estimate(**difference):+}"
    cells["masked-token accuracy"] = str(Estimate(**model["masked_token_accuracy"]))
    if found := model.get("completions"):
        cells["parse + say something"] = f"{found['both']}/{found['count']}"
        cells["parse"] = f"{found['parse']}/{found['count']}"
        cells["mean characters"] = f"{found['mean_characters']:.0f}"
    return cells


def score_table(rows: Sequence[Mapping[str, str]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of ``score_cells``: every column that a row has; empty where another lacks it."""
    head = list(dict.fromkeys(column for row in rows for column in row))
    return head, [[row.get(column, "") for column in head] for row in rows]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: columns to the left, a rule below the head."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])
