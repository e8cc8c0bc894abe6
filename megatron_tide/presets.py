"""Named sets of knobs. A preset only says what differs from the defaults in ``config.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    meaning: str
    flags: dict[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "paper": Preset("the published setting, which is the defaults"),
    "ours": Preset(
        "what we would run: unbiased masking, and a teacher that sees what the student sees",
        {"masking": "synchronous", "teacher_context": "staircase", "compdemo_split": "exact", "warmup_ratio": 0.03},
    ),
}
