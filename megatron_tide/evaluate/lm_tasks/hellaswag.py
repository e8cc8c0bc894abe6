"""Rows of HellaSwag -> questions. Loaded by lm-eval from beside the task's YAML."""

from __future__ import annotations

import re
from typing import Any


def process_docs(dataset: Any) -> Any:
    """Adds ``query``, ``choices`` and ``gold`` to each row."""
    return dataset.map(_question)


def _question(row: dict[str, Any]) -> dict[str, Any]:
    started = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "query": _plain(f"{row['activity_label']}: {started}"),
        "choices": [_plain(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _plain(text: str) -> str:
    """WikiHow's markers such as [title] are artefacts of how the data was collected."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
