"""The paper's eight benchmarks: settings of each, and the numbers it published.

Settings are those of TIDE's evaluation (arXiv 2604.26951): blocks of 32 that begin at the answer, greedy decoding,
one token per pass, no examples in the prompt but three for BBH. The paper names two tasks that only its own copy of
lm-eval has; ``note`` gives their replacement, and other points that the paper does not specify.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BenchmarkPreset:
    """How one benchmark is prompted, and which of its numbers is compared with the published one."""

    task: str
    """lm-eval's name, or that of a task in ``tasks``."""
    plain_task: str = ""
    """The task in its place where no chat template is applied; empty for the same one."""
    folders: tuple[str, ...] = ()
    """Folders below lm-eval's own tasks that define it; none for tasks of this package and of the user."""
    headline: tuple[str, str] | None = None
    """(metric, filter) of the published number."""
    new_tokens: int | None = 256
    """None for as many as the task itself names, or 256."""
    steps: int | None = 256
    """Passes per answer; None for one per token."""
    block_size: int = 32
    block_layout: str = "answer"
    """Where blocks begin: the published sampler pads prompts on the left."""
    few_shot: int | None = 0
    """Examples in the prompt; None for as many as the task itself names."""
    chat_template: bool = True
    temperature: float | None = 0.0
    """None for that of the task itself."""
    threshold: float | None = None
    """A pass also decides every token with a higher probability."""
    note: str = ""


PAPER = {
    "gsm8k": BenchmarkPreset(
        task="gsm8k_cot",
        folders=("gsm8k",),
        headline=("exact_match", "flexible-extract"),
        note="the paper does not say which of the task's two filters it reports",
    ),
    "math": BenchmarkPreset(
        task="minerva_math",
        folders=("minerva_math", "benchmarks"),
        headline=("math_verify", "none"),
        note="the paper does not say which of the task's two metrics it reports",
    ),
    "bbh": BenchmarkPreset(task="bbh", folders=("bbh",), headline=("exact_match", "get-answer"), few_shot=3),
    "mmlu_pro": BenchmarkPreset(task="mmlu_pro", folders=("mmlu_pro",), headline=("exact_match", "custom-extract")),
    "hellaswag": BenchmarkPreset(
        task="hellaswag_generative",
        headline=("exact_match", "letter"),
        new_tokens=3,
        steps=3,
        note="our generative task in place of hellaswag_gen, which lm-eval does not have; prompts differ",
    ),
    "mmlu": BenchmarkPreset(
        task="mmlu_generative",
        folders=("mmlu/generative",),
        headline=("exact_match", "get_response"),
        new_tokens=3,
        steps=3,
        note="lm-eval's mmlu_generative in place of mmlu_generative_dream, which it does not have; prompts differ",
    ),
    "humaneval": BenchmarkPreset(
        task="humaneval_instruct_sandboxed", plain_task="humaneval_sandboxed", headline=("pass@1", "none")
    ),
    "mbpp": BenchmarkPreset(
        task="mbpp_instruct_sandboxed",
        headline=("pass@1", "code"),
        note="lm-eval's mbpp_instruct, its programs run in the sandbox of this package",
    ),
}
PRESETS = {"paper": PAPER}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""How tasks of lm-eval name the length of an answer."""
DEFAULT_TOKENS = 256
"""lm-eval's, for a task that names none."""


def preset_of(benchmark: str, name: str = "paper") -> BenchmarkPreset:
    """A benchmark's preset; any other name is a task of lm-eval or of the user, with its own examples, answer length
    and temperature.
    """
    own = BenchmarkPreset(task=benchmark, few_shot=None, new_tokens=None, steps=None, temperature=None)
    return PRESETS[name].get(benchmark) or own


def own_settings(preset: BenchmarkPreset, task: str, stated: dict[str, Any]) -> tuple[BenchmarkPreset, list[str]]:
    """``preset`` with the ``generation_kwargs`` of a task in place of what it leaves open, and the names of those that
    decide a task's answers but are not used.

    Raises:
        ValueError: a value of another type or out of range.
    """
    stops = stated.get("until") or []
    if not isinstance(stops, str) and not (isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)):
        raise ValueError(f"task {task}: until in generation_kwargs is {str(stops)[:40]}, not text or a list of texts")
    lengths = [stated[name] for name in LENGTHS if stated.get(name) is not None]
    tokens, heat = preset.new_tokens, preset.temperature
    if tokens is None:
        tokens = lengths[0] if lengths else DEFAULT_TOKENS
    if heat is None:
        heat = 0.0 if stated.get("do_sample") is False else stated.get("temperature", 0.0)
    if type(tokens) is not int or tokens < 1 or type(heat) not in (int, float) or not 0.0 <= heat < float("inf"):
        raise ValueError(f"task {task}: {str(tokens)[:20]} tokens at temperature {str(heat)[:20]}; set both with flags")
    found = replace(preset, new_tokens=tokens, steps=preset.steps or tokens, temperature=float(heat))
    used = {*LENGTHS, "until", "temperature", "do_sample"}
    if preset.temperature is None and stated.get("do_sample") and not heat:  # greedy, as lm-eval's own models have it
        used.discard("do_sample")
    return found, sorted({*stated} - used)


def changed_preset(benchmark: str, name: str, changes: dict[str, Any]) -> BenchmarkPreset:
    """The preset ``name`` of a benchmark with the user's ``changes``; those that are None are ignored.

    Raises:
        ValueError: a change out of range.
    """
    given = {key: value for key, value in changes.items() if value is not None}
    if "new_tokens" in given:
        given.setdefault("steps", given["new_tokens"])  # one token per pass, as in the paper
    preset = replace(preset_of(benchmark, name), **given)
    if preset.plain_task and not preset.chat_template:
        preset = replace(preset, task=preset.plain_task)
    if min(number for number in (preset.new_tokens, preset.steps, 1) if number is not None) < 1:
        raise ValueError(f"{benchmark}: {preset.new_tokens} new tokens in {preset.steps} steps; give 1 or more of each")
    if preset.temperature is not None and not 0.0 <= preset.temperature < float("inf"):
        raise ValueError(f"{benchmark}: temperature {preset.temperature}; give 0 (greedy) or more")
    return preset


def published() -> dict[str, Any]:
    """The published table: ``source``, ``columns``, ``shown`` (a part of the columns), ``rows``; numbers in percent."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def published_row(benchmark: str) -> dict[str, float]:
    """Column -> percent; empty for a benchmark that the paper does not have."""
    table = published()
    return dict(zip(table["columns"], table["rows"].get(benchmark, [])))
