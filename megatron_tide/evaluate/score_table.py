"""The table of scores for people: one printing for the terminal, the report page and the recipes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tide.evaluate.bootstrap import Estimate


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
