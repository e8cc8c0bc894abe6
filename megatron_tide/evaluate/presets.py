"""The paper's eight benchmarks as presets, and what it published for them.

Settings are those of TIDE's evaluation (arXiv 2604.26951): blocks of 32, the likeliest token, as many passes as tokens,
no example but three for BBH. It names two tasks that only its own copy of lm-eval has; ours in their place are said in
``note``, and so is what else the paper leaves open.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How one benchmark is asked and which of its numbers is compared."""

    task: str
    """lm-eval's name; ``humaneval_instruct`` is asked and scored by this package itself (``humaneval``)."""
    folders: tuple[str, ...] = ()
    """Where below lm-eval's own tasks it is defined; none for tasks of this package and of the user."""
    headline: tuple[str, str] | None = None
    """(metric, filter) that the published number is put beside."""
    new_tokens: int = 256
    steps: int = 256
    """Passes for a whole answer."""
    block_size: int = 32
    few_shot: int | None = 0
    """Examples in the prompt; None for as many as the task itself names."""
    chat_template: bool = True
    temperature: float = 0.0
    note: str = ""


PAPER = {
    "gsm8k": Preset(
        task="gsm8k_cot",
        folders=("gsm8k",),
        headline=("exact_match", "flexible-extract"),
        note="the paper does not say which of the task's two filters it reports",
    ),
    "math": Preset(
        task="minerva_math",
        folders=("minerva_math", "benchmarks"),
        headline=("math_verify", "none"),
        note="the paper does not say which of the task's two metrics it reports",
    ),
    "bbh": Preset(task="bbh", folders=("bbh",), headline=("exact_match", "get-answer"), few_shot=3),
    "mmlu_pro": Preset(task="mmlu_pro", folders=("mmlu_pro",), headline=("exact_match", "custom-extract")),
    "hellaswag": Preset(
        task="hellaswag_generative",
        headline=("exact_match", "letter"),
        new_tokens=3,
        steps=3,
        note="our generative task in place of hellaswag_gen, which lm-eval does not have; prompts differ",
    ),
    "mmlu": Preset(
        task="mmlu_generative",
        folders=("mmlu/generative",),
        headline=("exact_match", "get_response"),
        new_tokens=3,
        steps=3,
        note="lm-eval's mmlu_generative in place of mmlu_generative_dream, which it does not have; prompts differ",
    ),
    "humaneval": Preset(task="humaneval_instruct", headline=("pass@1", "none")),
    "mbpp": Preset(
        task="mbpp_instruct_sandboxed",
        headline=("pass@1", "code"),
        note="lm-eval's mbpp_instruct, its programs run in the sandbox of this package",
    ),
}
PRESETS = {"paper": PAPER}


def preset_of(name: str, preset: str = "paper") -> Preset:
    """The preset of a benchmark; any other name is a task of lm-eval or of the user, with its own examples."""
    return PRESETS[preset].get(name) or Preset(task=name, few_shot=None)


def published() -> dict[str, Any]:
    """The published table: ``source``, ``columns``, ``shown`` (a part of the columns), ``rows``; numbers in percent."""
    return json.loads(HERE.joinpath("published.json").read_text(encoding="utf-8"))


def published_row(name: str) -> dict[str, float]:
    """Column -> percent of a benchmark; empty for one that the paper has not."""
    table = published()
    return dict(zip(table["columns"], table["rows"].get(name, [])))
